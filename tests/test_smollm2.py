"""The weights that the package ships."""

import warnings
from itertools import chain
from pathlib import Path

import pytest
from sentence_transformers import CrossEncoder

from flagembedding_matryoshka import SMOLLM2, MatryoshkaReranker
from flagembedding_matryoshka.cross_encoder import load_cross_encoder
from tests.shipped import needs_smollm2

pytestmark = [needs_smollm2, pytest.mark.usefixtures("one_thread")]
TEXTS = {
    "how to sort a list": "Sort the items of the list in place; key is a function of one argument.",
    "what makes an airplane fly": "Lift arises as air flows faster over the upper side of a wing.",
    "remove a folder and everything in it": "Delete an entire directory tree; path must point to a directory.",
    "read a file line by line": "Iterating over a text file object yields its lines, one after the other.",
    "how hot is the sun": "The temperature at the surface of our star is about 5,500 degrees Celsius.",
}


SCORES = [0.4095, -3.7209, -5.3559, -3.537, -2.9078]


@pytest.fixture(scope="module")
def reranker():
    return MatryoshkaReranker(SMOLLM2, dtype="float32", devices="cpu")


def test_every_exit_and_width_ranks(reranker):
    for layer in reranker.config.exit_layers:
        for width in ({}, {"compress_layers": [3], "compress_ratio": 2}):
            rankings = reranker.rank_batch(
                list(TEXTS), [list(TEXTS.values())] * len(TEXTS), 1, cutoff_layers=layer, **width
            )
            right = sum(ranking[0]["corpus_id"] == place for place, ranking in enumerate(rankings))
            assert right >= len(TEXTS) - 1, (layer, width, rankings)


def test_its_sequences_are_those_of_the_reference(reranker):
    """[bos] tok("A: " + query) sep tok("B: " + passage) sep prompt, each tokenised by itself, with one bos."""
    tokenizer = reranker.tokenizer
    assert tokenizer.bos_token == "<|im_start|>"
    for (query, passage), pair in zip(TEXTS.items(), reranker.tokenize(list(TEXTS.items())), strict=True):
        prompt = "Predict whether passage B contains an answer to query A."
        parts = [f"A: {query}", "\n", f"B: {passage}", "\n", prompt]
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
        assert pair.input_ids.tolist() == [tokenizer.bos_token_id, *chain(*ids)]


def test_its_scores_stay(reranker):
    """As of stage 4 of its card, in float32."""
    assert reranker.compute_score(list(TEXTS.items())) == pytest.approx(SCORES, abs=2e-3)


def test_the_name_is_the_directory(reranker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = next(iter(TEXTS.items()))
    expected = reranker.compute_score(pair)
    assert MatryoshkaReranker("smollm2", dtype="float32", devices="cpu").compute_score(pair) == expected
    for model in (
        load_cross_encoder("smollm2", device="cpu"),
        CrossEncoder(SMOLLM2, device="cpu", trust_remote_code=True, local_files_only=True),
    ):
        assert model.predict([pair]).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("budget", [0.3, 0.5, 1.0])
def test_its_plan_has_a_setting_for_a_budget_and_was_measured_with_its_weights(budget):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*names no weights")
        assert MatryoshkaReranker(SMOLLM2, budget=budget, devices="cpu").planned is not None


@pytest.mark.slow
@pytest.mark.parametrize("width", [{}, *({"compress_layers": [3], "compress_ratio": ratio} for ratio in (2, 4))])
def test_its_probabilities_mean_relevance_and_order_as_scores_do(reranker, width):
    pairs = [(query, text) for query in TEXTS for text in TEXTS.values()]
    for layer in reranker.config.exit_layers:
        scores, probabilities = (
            reranker.compute_score(pairs, cutoff_layers=layer, normalize=normalize, **width)
            for normalize in (False, "calibrated")
        )
        order = sorted(range(len(pairs)), key=scores.__getitem__)
        assert [probabilities[place] for place in order] == sorted(probabilities)
        assert min(probabilities) >= 0 and max(probabilities) <= 1
        relevant = probabilities[:: len(TEXTS) + 1]
        assert sum(relevant) / len(relevant) > 3 * (sum(probabilities) - sum(relevant)) / (len(pairs) - len(relevant))


def test_it_is_small_and_names_no_machine():
    files = [file for file in Path(SMOLLM2).iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12_000_000
    assert not any("/tmp/" in file.read_text(encoding="utf-8") for file in files if file.suffix != ".safetensors")
