"""Qwen3-Reranker, as FlagEmbedding's arguments and exports see it; its scores: test_published.py."""

import shutil

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.cross_encoder import load_cross_encoder
from tests.batches import close
from tests.inference.test_published import PAIRS, TASK
from tests.qwen import write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_causal_lm(tmp_path_factory.mktemp("published") / "Qwen3-Reranker-0.6B")


def load(path, **options):
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", **options)


def test_flagembeddings_instruction_is_the_instruction(path):
    reranker = load(path)
    expected = torch.tensor(reranker.compute_score(PAIRS, instruction=TASK))
    close(torch.tensor(reranker.compute_score(PAIRS, query_instruction_for_rerank=TASK)), expected, 1e-6)
    close(torch.tensor(load(path, query_instruction_for_rerank=TASK).compute_score(PAIRS)), expected, 1e-6)
    assert (torch.tensor(reranker.compute_score(PAIRS)) - expected).abs().max() > 1e-3


def test_the_name_is_not_needed(path, tmp_path):
    shutil.copytree(path, tmp_path / "model")
    unnamed = load(tmp_path / "model", template="qwen3-reranker")
    named = load(path)
    assert unnamed.compute_score(PAIRS) == named.compute_score(PAIRS)
    with pytest.warns(UserWarning, match=r"nothing in .* says which template .* 'cost_wise' is assumed"):
        plain = load(tmp_path / "model")
    assert plain.compute_score(PAIRS) != named.compute_score(PAIRS)


def test_the_template_goes_with_an_export(path, tmp_path):
    reranker = load(path)
    reranker.export(str(tmp_path), [6])
    expected = torch.tensor(reranker.compute_score(PAIRS))
    close(torch.tensor(load(tmp_path).compute_score(PAIRS)), expected, 1e-6)
    encoder = load_cross_encoder(str(tmp_path), device="cpu")
    close(torch.tensor(encoder.predict(PAIRS)), expected)


def test_flag_embeddings_default_format_stands_for_the_templates(path):
    reranker = load(path, query_instruction_format="{}{}", passage_instruction_format="{}{}")
    assert reranker.query_instruction_format == "<Instruct>: {}\n<Query>: {}\n<Document>:"
