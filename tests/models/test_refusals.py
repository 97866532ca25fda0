"""A checkpoint that is no causal decoder of a known kind is refused by what its configuration says."""

import json

import pytest
from transformers import CONFIG_MAPPING

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.models.backbones import BACKBONES, read_config
from flagembedding_matryoshka.models.refusals import REASONS
from tests.backbones import write_raw

SUPPORTED = {name for model in BACKBONES for name in (model.config_class.model_type, *model.config_class.made_from)}


@pytest.fixture(scope="module")
def raw_path(tiny_tokenizer, tmp_path_factory):
    return write_raw("qwen3", tiny_tokenizer, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def change_config(raw_path):
    """A function that writes other values into the checkpoint's configuration."""
    file = raw_path / "config.json"
    text = file.read_text()
    yield lambda **values: file.write_text(json.dumps(json.loads(text) | values))
    file.write_text(text)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("is_causal", False, "true"),
        ("causal", False, "true"),
        ("use_bidirectional_attention", True, "false"),
        ("use_bidirectional_attention", "all", "false"),
        ("use_bidirectional_attention", "vision", "false"),
        ("bidirectional", True, "false"),
        ("is_encoder_decoder", True, "false"),
    ],
)
def test_attention_that_is_not_causal_is_refused(name, value, allowed, change_config, raw_path):
    change_config(**{name: value})
    message = rf"{raw_path}: {name} is {value!r} in its configuration, but only {allowed} is allowed"
    with pytest.raises(ValueError, match=message):
        read_config(raw_path)
    with pytest.raises(ValueError, match=message):
        MatryoshkaReranker(str(raw_path), devices="cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_causal", True),
        ("is_causal", None),
        ("use_bidirectional_attention", False),
        ("use_bidirectional_attention", None),
        ("is_encoder_decoder", False),
    ],
)
def test_what_says_the_same_as_nothing_is_not_refused(name, value, change_config, raw_path):
    change_config(**{name: value})
    assert read_config(raw_path).num_hidden_layers == 6


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gemma"])
def test_the_field_of_gemma_is_refused_in_every_generation(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "use_bidirectional_attention": True}))
    with pytest.raises(ValueError, match="use_bidirectional_attention is True"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["JinaForRanking", "JinaForRankingV35"])
def test_a_model_that_ranks_lists_is_refused_by_its_architecture(name, change_config, raw_path):
    change_config(architectures=[name])
    with pytest.raises(ValueError, match=rf"{raw_path}: its architecture is '{name}', which ranks a list of passages"):
        read_config(raw_path)


@pytest.mark.parametrize("model_type", REASONS)
def test_a_known_model_type_is_refused_with_its_reason(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=rf"{tmp_path} holds a model of type '{model_type}'\. No backbone") as found:
        read_config(tmp_path)
    assert REASONS[model_type] in str(found.value)
    assert all(name in str(found.value) for name in SUPPORTED)


def test_reasons_are_of_types_that_exist_and_that_nothing_runs():
    of_remote_code = {"llama_bidirec"}
    assert set(REASONS) - of_remote_code <= set(CONFIG_MAPPING)
    assert not set(REASONS) & SUPPORTED


@pytest.mark.parametrize("stored", [{"model_type": "whatever"}, {}])
def test_an_unknown_model_type_names_those_that_there_are(stored, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(stored))
    name = stored.get("model_type", "")
    with pytest.raises(ValueError, match=rf"model of type '{name}'\. A re-ranker is made .* from one of .*smollm3"):
        read_config(tmp_path)
