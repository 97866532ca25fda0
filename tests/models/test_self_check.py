"""A backbone that does not compute what transformers' model does is refused before it scores anything."""

import copy
import logging

import pytest
import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Cohere2Model,
    GptOssConfig,
    GptOssForCausalLM,
    GptOssModel,
    NanoChatConfig,
    NanoChatForCausalLM,
    NanoChatModel,
    Olmo3Config,
    Olmo3ForCausalLM,
    Olmo3Model,
)
from transformers.models.cohere2.modeling_cohere2 import Cohere2DecoderLayer
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer
from transformers.models.nanochat.modeling_nanochat import NanoChatDecoderLayer
from transformers.models.olmo3.modeling_olmo3 import Olmo3DecoderLayer

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.models import backbones, self_check
from flagembedding_matryoshka.models.backbones import causal_lm_class, register_backbone
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.decoder import CostWiseModel
from flagembedding_matryoshka.models.layers import CostWiseLayer
from flagembedding_matryoshka.models.self_check import TOLERANCE, shrink
from tests.backbones import BACKBONES, read_config, write_raw

pytestmark = pytest.mark.usefixtures("one_thread")


def naive(name, stock_config, stock_layer, stock_model, stock_causal_lm, **of_model):
    """A backbone as short as one can be."""
    config = strict(
        type(f"Naive{name}Config", (CostWiseConfig, stock_config), {"model_type": f"naive_{name}", "made_from": ()})
    )
    layer = type(f"Naive{name}DecoderLayer", (CostWiseLayer, stock_layer), {})
    model = type(
        f"Naive{name}Model", (CostWiseModel, stock_model), {"config_class": config, "layer_class": layer, **of_model}
    )
    return type(
        f"Naive{name}ForCausalLM",
        (CostWiseForCausalLM, stock_causal_lm),
        {"config_class": config, "model_class": model},
    )


@pytest.fixture(scope="module")
def nanochat():
    return naive("NanoChat", NanoChatConfig, NanoChatDecoderLayer, NanoChatModel, NanoChatForCausalLM)


@pytest.fixture(scope="module")
def cohere2():
    return naive("Cohere2", Cohere2Config, Cohere2DecoderLayer, Cohere2Model, Cohere2ForCausalLM)


@pytest.fixture
def afresh(monkeypatch):
    """Nothing has passed yet; the configurations of copies that are compared."""
    compared = []
    compare = self_check._check

    def counted(model_class, values):
        compared.append(values)
        compare(model_class, values)

    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setattr(self_check, "_check", counted)
    return compared


@pytest.mark.parametrize("model", backbones.BACKBONES)
def test_every_backbone_passes_with_its_defaults(model, afresh):
    self_check.self_check(model)
    assert len(afresh) == 1


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_passes_with_a_checkpoints_structure(name, tiny_tokenizer, tmp_path, afresh, caplog):
    config = read_config(write_raw(name, tiny_tokenizer, tmp_path))
    before = copy.deepcopy(config.to_dict())
    with caplog.at_level(logging.WARNING, "flagembedding_matryoshka"):
        self_check.self_check(causal_lm_class(config), config)
    assert len(afresh) == 1 and "default configuration" not in caplog.text
    assert config.to_dict() == before


@pytest.mark.parametrize("name", ["nanochat", "cohere2"])
def test_a_model_that_does_more_than_run_its_layers_is_not_registered(name, request):
    model = request.getfixturevalue(name)
    stock = model.__mro__[2].__name__
    message = (
        rf"{model.__name__} does not compute what {stock} does: .* differ by [0-9.]+ where .*`embeddings`.*`finish`"
    )
    with pytest.raises(ValueError, match=message):
        register_backbone(model)
    assert model not in backbones._BY_MODEL_TYPE.values()


def test_the_same_models_pass_when_the_rest_is_written(nanochat, cohere2):
    class WholeNanoChatModel(nanochat.model_class):
        def embeddings(self, token_ids):
            return self.norm(super().embeddings(token_ids))

    class WholeNanoChat(nanochat):
        model_class = WholeNanoChatModel

        def finish(self, scores):
            cap = self.config.final_logit_softcapping
            return torch.tanh(scores / cap) * cap

    class WholeCohere2(cohere2):
        def finish(self, scores):
            return scores * self.config.logit_scale

    self_check.self_check(WholeNanoChat)
    self_check.self_check(WholeCohere2)


def test_what_attention_does_not_know_is_named():
    model = naive("GptOss", GptOssConfig, GptOssDecoderLayer, GptOssModel, GptOssForCausalLM)
    with pytest.raises(ValueError, match=r"NaiveGptOssForCausalLM cannot score a packed batch: TypeError: .*s_aux"):
        register_backbone(model)


def test_a_rotary_embedding_by_layer_type_must_be_said():
    parts = (Olmo3Config, Olmo3DecoderLayer, Olmo3Model, Olmo3ForCausalLM)
    with pytest.raises(ValueError, match=r"cannot score a packed batch: TypeError: .*layer_type"):
        self_check.self_check(naive("Olmo3", *parts))
    self_check.self_check(naive("Olmo3", *parts, rotary_by_layer_type=True))


def test_a_backbone_may_be_written_in_a_notebook():
    """transformers looks for the source of a class, and warns that attention cannot be set where there is none."""
    parts = (Olmo3Config, Olmo3DecoderLayer, Olmo3Model, Olmo3ForCausalLM)
    model = naive("Olmo3", *parts, rotary_by_layer_type=True, __module__="a_notebook")
    self_check.self_check(model)


def test_a_model_with_attention_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(Olmo3Model, "_can_set_attn_implementation", classmethod(lambda cls: False))
    parts = (Olmo3Config, Olmo3DecoderLayer, Olmo3Model, Olmo3ForCausalLM)
    with pytest.raises(ValueError, match=r"NaiveOlmo3Model cannot run on a packed row: .*AttentionInterface"):
        self_check.self_check(naive("Olmo3", *parts, rotary_by_layer_type=True))


def forget_finish(model):
    return type("Broken", (model,), {"finish": lambda self, scores: scores})


def with_model(model, **methods):
    own_model = type("BrokenModel", (model.model_class,), methods)
    return type("Broken", (model,), {"model_class": own_model})


def scale_again(model):
    def embeddings(self, token_ids):
        scale = getattr(self.config, "embedding_multiplier", self.config.hidden_size**0.5)
        return model.model_class.embeddings(self, token_ids) * scale

    return with_model(model, embeddings=embeddings)


def change_attention(model, **values):
    class BrokenLayer(model.model_class.layer_class):
        def forward(self, *args, **kwargs):
            for name, value in values.items():
                assert hasattr(self.self_attn, name)
                setattr(self.self_attn, name, value)
            return super().forward(*args, **kwargs)

    return with_model(model, layer_class=BrokenLayer)


def forget_biases(model):
    class BrokenLayer(model.model_class.layer_class):
        def forward(self, *args, **kwargs):
            self.self_attn.q_proj.bias = None
            return super().forward(*args, **kwargs)

    return with_model(model, layer_class=BrokenLayer)


def swap_rotary_embeddings(model):
    def rotary_embeddings(self, hidden, packed):
        return model.model_class.rotary_embeddings(self, hidden, packed)[::-1]

    return with_model(model, rotary_embeddings=rotary_embeddings)


MISTAKES = {
    "no divisor of scores": forget_finish(backbones.CostWiseGraniteForCausalLM),
    "no cap of scores": forget_finish(backbones.CostWiseGemma2ForCausalLM),
    "embeddings scaled twice": scale_again(backbones.CostWiseGraniteForCausalLM),
    "embeddings scaled twice, Gemma": scale_again(backbones.CostWiseGemma1ForCausalLM),
    "embeddings scaled twice, Gemma-3": scale_again(backbones.CostWiseGemma3ForCausalLM),
    "no biases": forget_biases(backbones.CostWiseQwen2ForCausalLM),
    "another scale of attention": change_attention(backbones.CostWiseMistralForCausalLM, scaling=0.1),
    "no window": change_attention(backbones.CostWiseGemma3ForCausalLM, sliding_window=None),
    "rotary embedding in all layers": change_attention(backbones.CostWiseSmolLM3ForCausalLM, use_rope=1),
    "rotary embeddings of other layers": swap_rotary_embeddings(backbones.CostWiseGemma3ForCausalLM),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_backbone_is_found(mistake):
    broken = MISTAKES[mistake]
    is_granite = issubclass(broken, backbones.CostWiseGraniteForCausalLM)  # by default, its multipliers are 1
    config = broken.config_class(**({"embedding_multiplier": 12.0, "logits_scaling": 8.0} if is_granite else {}))
    with pytest.raises(ValueError, match="Broken does not compute what"):
        self_check.self_check(broken, config)


def test_a_difference_of_a_hundredth_is_found_and_rounding_is_not():
    def with_finish(factor):
        return type("Broken", (backbones.CostWiseQwen3ForCausalLM,), {"finish": lambda self, scores: scores * factor})

    self_check.self_check(with_finish(1 + TOLERANCE / 10))
    with pytest.raises(ValueError, match="does not compute"):
        self_check.self_check(with_finish(1 + TOLERANCE * 2))


def test_each_structure_is_checked_once(afresh):
    model = backbones.CostWiseGemma2ForCausalLM
    self_check.self_check(model, model.config_class())
    self_check.self_check(model, model.config_class(num_hidden_layers=42, hidden_size=3584, num_attention_heads=16))
    assert len(afresh) == 1
    self_check.self_check(model, model.config_class(final_logit_softcapping=None))
    assert len(afresh) == 2
    broken = forget_finish(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="does not compute"):
            self_check.self_check(broken)
    assert len(afresh) == 4


def test_a_small_copy_keeps_a_layer_of_each_kind():
    gemma3 = shrink(backbones.CostWiseGemma3Config(sliding_window=512))
    assert gemma3["layer_types"] == ["sliding_attention", "full_attention"]
    assert (gemma3["num_hidden_layers"], gemma3["sliding_window"], gemma3["query_pre_attn_scalar"]) == (2, 5, 256)
    smollm3 = shrink(backbones.CostWiseSmolLM3Config(use_sliding_window=False, sliding_window=None))
    assert smollm3["no_rope_layers"] == [1, 0] and smollm3["sliding_window"] is None
    one_kind = shrink(backbones.CostWiseQwen3Config(num_hidden_layers=28))
    assert one_kind["num_hidden_layers"] == 2 and one_kind["layer_types"] == ["full_attention"] * 2
    assert one_kind["head_dim"] == 128
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5] * 48, "long_factor": [2.0] * 48}
    config = backbones.CostWisePhi3Config(
        rope_parameters=longrope | {"original_max_position_embeddings": 4096}, max_position_embeddings=8192
    )
    assert shrink(config)["rope_parameters"]["short_factor"] == [1.5] * 48
    self_check.self_check(backbones.CostWisePhi3ForCausalLM, config)


def test_a_configuration_that_cannot_be_shrunk_is_checked_by_the_defaults(afresh, caplog):
    model = backbones.CostWiseQwen3ForCausalLM
    config = model.config_class()
    config.hidden_act = "nothing"
    with caplog.at_level(logging.WARNING, "flagembedding_matryoshka"):
        self_check.self_check(model, config)
    assert "CostWiseQwen3ForCausalLM is compared with transformers' model by its default" in caplog.text
    assert "nothing" in caplog.text and len(afresh) == 2


def test_the_state_of_torch_stays(afresh):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_float32_matmul_precision("medium")
        with torch.device("meta"):
            self_check.self_check(backbones.CostWiseGemma3ForCausalLM)
            assert torch.empty(1).device.type == "meta"
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    assert len(afresh) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_the_first_load_of_a_checkpoint_checks_its_backbone(tiny_layerwise_path, afresh, monkeypatch):
    MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu")
    MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu")
    assert len(afresh) == 1
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setattr(backbones.CostWiseMistralForCausalLM, "finish", lambda self, scores: scores * 2)
    with pytest.raises(ValueError, match="CostWiseMistralForCausalLM does not compute what MistralForCausalLM does"):
        MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu")
