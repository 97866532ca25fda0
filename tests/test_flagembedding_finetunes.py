"""Scores of re-rankers that FlagEmbedding's own runners fine-tuned (tests/flagembedding_finetunes)."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint, load_tokenizer
from tests.batches import close

pytestmark = pytest.mark.usefixtures("one_thread", "beside_the_bases")
FINETUNES = Path(__file__).parent / "flagembedding_finetunes"
GOLDEN = json.loads((FINETUNES / "scores.json").read_text(encoding="utf-8"))
TEMPLATES = {"plain": {"template": "minicpm"}}  # a raw language model says nothing of the words it was trained with
CASES = [
    (name, kind, path, peft_path)
    for name in GOLDEN["scores"]
    for kind, path, peft_path in [
        ("base", name.split("_")[0] + "_base", None),
        ("adapter", name.split("_")[0] + "_base", name),
        ("adapter", name, None),
        ("merged", name + "_merged", None),
    ]
    if (FINETUNES / path).exists()
]


@pytest.fixture
def beside_the_bases(monkeypatch):
    """The adapters note their bases by paths from here."""
    monkeypatch.chdir(FINETUNES)


def load(path, **options):
    lengths = {name: GOLDEN[name] for name in ("query_max_length", "max_length")}
    return MatryoshkaReranker(path, dtype="float32", devices="cpu", local_files_only=True, **lengths, **options)


def scores(reranker):
    """(exits, pairs); of a plain language model the last layer's alone."""
    exits = reranker.config.exit_layers
    found = reranker.compute_score(GOLDEN["pairs"], cutoff_layers=exits if exits == GOLDEN["exits"] else exits[-1:])
    return torch.tensor(found).reshape(-1, len(GOLDEN["pairs"]))


def expected(name, kind):
    return torch.tensor(GOLDEN["scores"][name][kind])


@pytest.mark.parametrize(("name", "kind", "path", "peft_path"), CASES)
def test_a_fine_tune_scores_as_flagembedding_does(name, kind, path, peft_path):
    reranker = load(path, peft_path=peft_path, **TEMPLATES.get(name, {}))
    close(scores(reranker), expected(name, kind), 1e-5)


def test_every_kind_of_fine_tune_is_compared():
    assert len(CASES) == 3 * 3 + 2


@pytest.mark.parametrize("name", GOLDEN["scores"])
def test_an_adapter_matters_at_every_exit(name):
    base = scores(load(name.split("_")[0] + "_base", **TEMPLATES.get(name, {})))
    assert ((base - expected(name, "adapter")).abs().amax(1) > 1e-2).all()


def test_the_words_matter():
    assert inspect_checkpoint("layerwise").description.template_name.value == "minicpm"
    other = scores(load("plain_merged", template="cost_wise"))
    assert (other - expected("plain", "merged")).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "kind", "path", "peft_path"), CASES)
def test_loading_says_nothing(name, kind, path, peft_path):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    loggers = [logging.getLogger(package) for package in ("transformers", "peft", "flagembedding_matryoshka")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            load(path, peft_path=peft_path, **TEMPLATES.get(name, {}))
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    assert [str(warning.message) for warning in warned] == []


def test_the_code_that_a_checkpoint_names_does_not_run(tmp_path):
    shutil.copytree("layerwise_merged", tmp_path / "model")
    for name in ("configuration_minicpm_reranker.py", "modeling_minicpm_reranker.py"):
        (tmp_path / "model" / name).write_text("raise RuntimeError('this code ran')\n")
    reranker = load(tmp_path / "model", trust_remote_code=True)
    close(scores(reranker), expected("layerwise", "merged"), 1e-5)


def test_flagembedding_finds_its_own_class_of_a_minicpm():
    load("layerwise_merged")
    assert "minicpm" not in CONFIG_MAPPING


def test_an_adapter_on_fewer_layers_than_it_was_trained_on():
    reranker = load("layerwise", max_layer=3)
    found = reranker.compute_score(GOLDEN["pairs"], cutoff_layers=[2, 3])
    close(torch.tensor(found), expected("layerwise", "adapter")[:2], 1e-5)


def test_an_adapter_whose_base_is_not_found_is_refused_by_both_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = str(FINETUNES / "layerwise")
    with pytest.raises(FileNotFoundError) as refused:
        load(adapter)
    message = str(refused.value)
    assert message.startswith(f"the adapter {adapter} was trained on layerwise_base, which is neither a directory here")
    assert f"Load the base from where it is, with peft_path={adapter!r}." in message


@pytest.mark.parametrize("base", [None, ""])
def test_an_adapter_that_notes_no_base_is_refused(tmp_path, base):
    shutil.copytree("layerwise", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=rf"adapter has base_model_name_or_path={base!r}\. Load the base"):
        load(tmp_path / "adapter")
    beside_its_base = load("layerwise_base", peft_path=tmp_path / "adapter")
    close(scores(beside_its_base), expected("layerwise", "adapter"), 1e-5)


def test_an_adapter_on_a_base_without_a_backbone_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    shutil.copytree("layerwise", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(ValueError, match="base holds a model of type 'bert'"):
        load(tmp_path / "adapter")


def test_a_minicpm_trained_without_lora_holds_a_copy_of_its_embedding(tmp_path):
    # Its runner clones a state dict in which lm_head.weight is tied to the embedding.
    shutil.copytree("layerwise_merged", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    close(scores(load(tmp_path / "model")), expected("layerwise", "merged"), 1e-5)
    save_file(weights | {"lm_head.bias": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no place for: \['lm_head\.bias'\]"):
        load(tmp_path / "model")


@pytest.mark.parametrize("declared", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_a_sentencepiece_model_alone_has_the_tokens_of_its_tokenizer_json(tmp_path, declared):
    shutil.copytree("plain_base", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": declared}))
    alone, whole = load_tokenizer(tmp_path / "model"), load_tokenizer("plain_merged")
    assert alone.padding_side == "right"
    for text in ("Yes", "\n", "A: wing", "B: Größe:\n\n 12 №", "a  b", GOLDEN["prompt"]):
        ids = alone(text, add_special_tokens=False)["input_ids"]
        assert ids == whole(text, add_special_tokens=False)["input_ids"], text
