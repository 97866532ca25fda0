"""Sequence classifiers of transformers are re-rankers with one exit, at the end."""

import pytest
import torch
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint, load_model, load_tokenizer
from tests.backbones import BACKBONES, LAYERS, write_raw
from tests.batches import close

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSIFIERS = [name for name, tiny in BACKBONES.items() if tiny.config in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING]
PAIRS = [("how does a wing lift", "air flows faster over the upper side of a wing."), ("heat", "heat " * 20), ("a", "")]


def write_classifier(name, tokenizer, path):
    return write_raw(name, tokenizer, path, AutoModelForSequenceClassification, num_labels=1)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_are_those_of_transformers(name, tiny_tokenizer, tmp_path):
    path = write_classifier(name, tiny_tokenizer, tmp_path)
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu", template="cost_wise")
    assert reranker.config.exit_layers == [LAYERS]
    plain = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()
    ids = [pair.input_ids.tolist() for pair in reranker.tokenize(PAIRS)]
    expected = torch.stack([plain(torch.tensor([one])).logits[0, 0] for one in ids])
    assert expected.std() > 1e-2
    close(torch.tensor(reranker.compute_score(PAIRS)), expected, 1e-5)
    narrow = reranker.compute_score(PAIRS, compress_layers=[2], compress_ratio=2)
    assert narrow != pytest.approx(expected.tolist(), abs=1e-4)


def test_those_that_are_published_are_among_them():
    assert {"mistral", "llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "smollm3"} <= set(CLASSIFIERS)


@torch.no_grad()
def test_other_exits_start_as_its_head(tiny_tokenizer, tmp_path):
    path = write_classifier("qwen3", tiny_tokenizer, tmp_path)
    checkpoint = inspect_checkpoint(path, exits=[2, 4, LAYERS], template="cost_wise")
    model = load_model(checkpoint, load_tokenizer(path), torch.float32)
    score = AutoModelForSequenceClassification.from_pretrained(path).score.weight
    assert model.config.exit_layers == [2, 4, LAYERS]
    for head in model.lm_head:
        assert torch.equal(head.linear_head.weight, score)
    with pytest.raises(ValueError, match=f"the deepest exit of .* is {LAYERS}"):
        inspect_checkpoint(path, exits=[2, 4], template="cost_wise")


def test_it_is_exported_as_a_layer_wise_checkpoint(tiny_tokenizer, tmp_path):
    path = write_classifier("llama", tiny_tokenizer, tmp_path / "classifier")
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu", template="question-passage")
    reranker.export(str(tmp_path / "ours"))
    again = MatryoshkaReranker(str(tmp_path / "ours"), dtype="float32", devices="cpu")
    assert again.description.architecture.value == "layer-wise"
    assert again.description.template_name.value == "question-passage"
    close(torch.tensor(again.compute_score(PAIRS)), torch.tensor(reranker.compute_score(PAIRS)), 1e-6)


def test_it_is_not_raw(tiny_tokenizer, tmp_path):
    path = write_classifier("llama", tiny_tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"from_raw=True, but .* is a sequence classifier, which has its head"):
        inspect_checkpoint(path, from_raw=True, template="cost_wise")
    with pytest.raises(ValueError, match=r"start_layer=2, but the heads of .* were trained with exits=\[6\]"):
        inspect_checkpoint(path, start_layer=2, template="cost_wise")
