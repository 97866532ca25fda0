"""Scores of FlagEmbedding's published kinds of re-ranker (shared/parity_gemma2, shared/parity_minicpm)."""

import json

import pytest
import torch

from flagembedding_matryoshka import CostWiseGemmaForCausalLM, CostWiseGraniteForCausalLM, MatryoshkaReranker
from tests.batches import TokenSequence, close, scores

pytestmark = pytest.mark.usefixtures("one_thread")
PUBLISHED = {"parity_gemma2": CostWiseGemmaForCausalLM, "parity_minicpm": CostWiseGraniteForCausalLM}


@pytest.fixture(scope="module", params=PUBLISHED)
def golden(request, shared):
    """What a golden set holds, with the directory of its checkpoint and the class that it is."""
    path = shared(request.param)
    return json.loads((path / "scores.json").read_text()) | {
        "path": path / "layerwise_model",
        "class": PUBLISHED[request.param],
    }


def cases(golden):
    """(width, scores[exit][pair]) of each case."""
    if "layerwise" not in golden:
        return [({}, torch.tensor(golden["scores"]))]
    return [
        ({name: case[name] for name in ("compress_layers", "compress_ratio")}, torch.tensor(case["scores"]))
        for case in golden["layerwise"]
    ]


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_one_padded_batch_scores_as_the_reference_did_pair_by_pair(golden, side):
    model = golden["class"].from_pretrained(golden["path"], dtype=torch.float32).eval()
    assert model.config.exit_layers == golden["layers"]
    parts = (golden["input_ids"], golden["query_lengths"], golden["prompt_lengths"])
    sequences = [TokenSequence(*values) for values in zip(*parts, strict=True)]
    for width, expected in cases(golden):
        actual = scores(model, sequences, side, cutoff_layers=golden["layers"], **width)
        close(actual, expected, 2e-5)


@pytest.fixture(scope="module")
def reranker(golden):
    return MatryoshkaReranker(
        str(golden["path"]),
        dtype="float32",
        devices="cpu",
        prompt=golden["prompt"],
        query_max_length=golden["query_max_length"],
        max_length=golden["max_length"],
    )


def test_text_gives_the_same_scores(golden, reranker):
    # The MiniCPM set has its longest pairs cut to the room beside another, shorter prompt; FlagEmbedding's class would
    # have left them as we do.
    counts = [reranker.count_tokens(query, [passage]) for query, passage in golden["pairs"]]
    lengths = [shared + own for shared, (own,) in counts]
    same = [index for index, ids in enumerate(golden["input_ids"]) if len(ids) == lengths[index]]
    assert len(same) == (16 if "one_exit" in golden else 23)
    pairs = [golden["pairs"][index] for index in same]
    for width, expected in cases(golden):
        actual = reranker.compute_score(pairs, cutoff_layers=golden["layers"], **width)
        close(torch.tensor(actual), expected[:, same], 2e-5)


def test_no_golden_case_is_left_out(golden):
    assert len(cases(golden)) == (5 if "layerwise" in golden else 1)
