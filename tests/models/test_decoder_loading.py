"""Raw and layer-wise checkpoints into the model and out of it."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from flagembedding_matryoshka import CostWiseMistralConfig, CostWiseMistralForCausalLM
from tests.batches import EXITS, LENGTHS, close, random_sequences, scores

pytestmark = pytest.mark.usefixtures("one_thread")
SEQUENCES = random_sequences(LENGTHS)
WIDTH = {"compress_layers": [2, 4], "compress_ratio": 2}
HEAD_TOKEN = 17


def layer_wise_config(path, **changes):
    config = CostWiseMistralConfig.from_pretrained(path)
    for name, value in ({"layer_wise": True, "start_layer": 2, "head_token_id": HEAD_TOKEN} | changes).items():
        setattr(config, name, value)
    return config


def from_raw(path, **kwargs):
    return CostWiseMistralForCausalLM.from_pretrained(path, config=layer_wise_config(path), **kwargs)


def assert_same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.dtype == others[name].dtype and torch.equal(weight, others[name]), name


@pytest.fixture
def warnings_of_loading(caplog):
    """A function that gives the package's own warnings so far."""
    return lambda: [
        record.getMessage() for record in caplog.records if record.name == "flagembedding_matryoshka.models.causal_lm"
    ]


@pytest.fixture(scope="module")
def tied_raw_path(tmp_path_factory):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("tied")
    MistralForCausalLM(config).save_pretrained(path)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    return path


# Raw checkpoints


@pytest.mark.parametrize("kind", ["tiny_raw_model_path", "tied_raw_path"])
def test_heads_of_a_raw_checkpoint_are_rows_of_its_vocabulary_head(request, kind, warnings_of_loading, tmp_path):
    path = request.getfixturevalue(kind)
    raw = MistralForCausalLM.from_pretrained(path)
    model = from_raw(path)
    assert [len(head.linear_head.weight) for head in model.lm_head] == [1] * len(EXITS)
    for head in model.lm_head:
        assert torch.equal(head.linear_head.weight[0], raw.lm_head.weight[HEAD_TOKEN])
    decoder = {name: weight for name, weight in model.model.named_parameters()}
    assert decoder.keys() == dict(raw.model.named_parameters()).keys()
    assert all(torch.equal(weight, decoder[name]) for name, weight in raw.model.named_parameters())
    assert not warnings_of_loading()
    with torch.no_grad():
        model.lm_head[0].linear_head.weight += 1
    assert torch.equal(model.lm_head[1].linear_head.weight[0], raw.lm_head.weight[HEAD_TOKEN]), "heads share memory"
    model.save_pretrained(tmp_path)
    assert_same_weights(CostWiseMistralForCausalLM.from_pretrained(tmp_path), model)


def test_heads_are_random_with_a_warning_where_no_token_is_known(tiny_raw_model_path, warnings_of_loading):
    config = layer_wise_config(tiny_raw_model_path, head_token_id=None)
    model = CostWiseMistralForCausalLM.from_pretrained(tiny_raw_model_path, config=config)
    weights = torch.cat([head.linear_head.weight for head in model.lm_head])
    assert len(weights.unique(dim=0)) == len(EXITS)
    assert 0.5 < float(weights.detach().std() / config.initializer_range) < 2
    (message,) = warnings_of_loading()
    assert "head_token_id is not set" in message


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_raw_model_path, tmp_path):
    shutil.copytree(tiny_raw_model_path, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"], weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['lm_head.weight', 'model.norm.weight'\]"):
        from_raw(tmp_path)


def test_loading_leaves_the_given_configuration_alone(tiny_raw_model_path):
    config = layer_wise_config(tiny_raw_model_path)
    before = config.to_dict()
    CostWiseMistralForCausalLM.from_pretrained(tiny_raw_model_path, config=config)
    assert config.to_dict() == before


def test_loading_info_comes_along(tiny_raw_model_path):
    model, info = from_raw(tiny_raw_model_path, output_loading_info=True)
    assert model.config.layer_wise
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
@pytest.mark.parametrize("kind", ["tiny_raw_model_path", "tiny_layerwise_path"])
def test_the_dtype_is_that_of_all_weights_but_heads_which_stay_exact(request, kind, name, dtype):
    path = request.getfixturevalue(kind)
    config = layer_wise_config(path)
    model = CostWiseMistralForCausalLM.from_pretrained(path, config=config, **{name: dtype})
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.lm_head.parameters()} == {torch.float32}


def test_a_raw_checkpoint_needs_to_be_told_its_exits(tiny_raw_model_path):
    message = r"raw_model.* has no scoring heads: give a config with layer_wise=True.*AutoModelForCausalLM"
    with pytest.raises(ValueError, match=message):
        CostWiseMistralForCausalLM.from_pretrained(tiny_raw_model_path)


# Layer-wise checkpoints


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_change_no_bit(tiny_layerwise_path, tmp_path, dtype):
    model = CostWiseMistralForCausalLM.from_pretrained(tiny_layerwise_path, dtype=dtype)
    model.save_pretrained(tmp_path)
    for cls in (CostWiseMistralForCausalLM, AutoModelForCausalLM):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is CostWiseMistralForCausalLM
        assert_same_weights(again, model)
        assert again.config.exit_layers == list(EXITS)
        close(scores(again, SEQUENCES, **WIDTH), scores(model, SEQUENCES, **WIDTH), 1e-6)


def test_files_are_named_as_the_reference_names_them(tiny_layerwise_path):
    saved = load_file(tiny_layerwise_path / "model.safetensors")
    heads = {f"lm_head.{index}.linear_head.weight" for index in range(len(EXITS))}
    assert {name for name in saved if name.startswith("lm_head")} == heads
    config = json.loads((tiny_layerwise_path / "config.json").read_text())
    assert config["model_type"] == "cost_wise_mistral"
    assert (config["layer_wise"], config["start_layer"], config["layer_sep"]) == (True, 2, 1)
    assert type(AutoConfig.from_pretrained(tiny_layerwise_path)) is CostWiseMistralConfig


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tiny_raw_model_path", "tiny_layerwise_path"])
def test_several_files_load_as_one(request, kind, tmp_path):
    path = request.getfixturevalue(kind)
    whole = CostWiseMistralForCausalLM.from_pretrained(path, config=layer_wise_config(path))
    cls = MistralForCausalLM if kind == "tiny_raw_model_path" else CostWiseMistralForCausalLM
    cls.from_pretrained(path).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(CostWiseMistralForCausalLM.from_pretrained(tmp_path, config=layer_wise_config(tmp_path)), whole)


@torch.no_grad()
def test_fewer_layers_are_the_lower_part(tiny_layerwise_path, layerwise_model, tmp_path):
    config = CostWiseMistralConfig.from_pretrained(tiny_layerwise_path, num_hidden_layers=4)
    lower, info = CostWiseMistralForCausalLM.from_pretrained(
        tiny_layerwise_path, config=config, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    lower.save_pretrained(tmp_path)
    for model in (lower, CostWiseMistralForCausalLM.from_pretrained(tmp_path)):
        assert len(model.model.layers) == 4 and model.config.exit_layers == [2, 3, 4]
        expected = scores(layerwise_model, SEQUENCES, cutoff_layers=[2, 3, 4], **WIDTH)
        close(scores(model, SEQUENCES, cutoff_layers=[2, 3, 4], **WIDTH), expected, 1e-6)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_code_beside_a_checkpoint_never_runs(tiny_layerwise_path, layerwise_model, tmp_path, trust):
    path = shutil.copytree(tiny_layerwise_path, tmp_path / "published")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_published.CostWiseMistralConfig",
        "AutoModelForCausalLM": "modeling_published.CostWiseMistralForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_published.py").write_text('raise RuntimeError("remote code ran")\n')
    for cls in (CostWiseMistralForCausalLM, AutoModelForCausalLM):
        model = cls.from_pretrained(path, **trust)
        assert type(model) is CostWiseMistralForCausalLM
        assert_same_weights(model, layerwise_model)
    assert type(AutoConfig.from_pretrained(path, **trust)) is CostWiseMistralConfig


# Refusals


@pytest.mark.parametrize(
    ("name", "value", "exits"),
    [("start_layer", 3, [3, 4, 5, 6]), ("layer_sep", 2, [2, 4, 6]), ("exits", [2, 4, 5], [2, 4, 5])],
)
def test_heads_at_other_layers_are_refused(tiny_layerwise_path, name, value, exits):
    config = layer_wise_config(tiny_layerwise_path, **{name: value})
    message = re.escape(f"the exits asked for are {exits}, but the heads of {tiny_layerwise_path} were saved for [2, 3")
    with pytest.raises(ValueError, match=message):
        CostWiseMistralForCausalLM.from_pretrained(tiny_layerwise_path, config=config)


@pytest.mark.parametrize("model_type", ["llama", "bert", None])
def test_another_architecture_is_refused(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    message = rf"holds a model of type {model_type!r}; a 'cost_wise_mistral' is made from 'mistral'"
    with pytest.raises(ValueError, match=message):
        CostWiseMistralForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_an_attention_without_packed_form_is_refused(tiny_layerwise_path, tiny_raw_model_path, attention):
    message = rf"attn_implementation='{attention}' has no packed form.*Leave the argument out"
    for path in (tiny_layerwise_path, tiny_raw_model_path):
        with pytest.raises(ValueError, match=message):
            CostWiseMistralForCausalLM.from_pretrained(
                path, config=layer_wise_config(path), attn_implementation=attention
            )
