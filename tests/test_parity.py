"""Scores of the reference (shared/parity) for ids given as ids. From text: test_checkpoint.py."""

import json

import pytest
import torch

from flagembedding_matryoshka import CostWiseMistralForCausalLM
from tests.batches import TokenSequence, close, scores

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def golden(shared_parity):
    return json.loads((shared_parity / "scores.json").read_text())


@pytest.fixture(scope="module")
def model(shared_parity):
    return CostWiseMistralForCausalLM.from_pretrained(shared_parity / "layerwise_model", dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", range(5))
def test_one_padded_batch_scores_as_the_reference_did_pair_by_pair(golden, model, case, side):
    expected = golden["layerwise"][case]
    parts = (golden["input_ids"], golden["query_lengths"], golden["prompt_lengths"])
    sequences = [TokenSequence(*values) for values in zip(*parts, strict=True)]
    width = {name: expected[name] for name in ("compress_layers", "compress_ratio")}
    actual = scores(model, sequences, side, cutoff_layers=golden["layers"], **width)
    close(actual, torch.tensor(expected["scores"]), 2e-5)


def test_no_golden_case_is_left_out(golden):
    assert len(golden["layerwise"]) == 5
