"""A tiny checkpoint of each backbone, in which all that is different about it matters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)

from flagembedding_matryoshka.models.backbones import causal_lm_class, read_config

LAYERS = 6
HEAD_TOKEN = 17


@dataclass(frozen=True)
class Tiny:
    """A decoder and what a slow model must know about it.

    Attributes:
        embedding_scale: what its model multiplies embeddings with.
        finish: what it does to its logits.
    """

    config: type[PreTrainedConfig]
    values: dict[str, Any] = field(default_factory=dict)
    embedding_scale: float = 1.0
    finish: Callable[[Tensor], Tensor] = lambda logits: logits


BACKBONES = {
    "mistral": Tiny(MistralConfig, {"sliding_window": 9}),
    "llama": Tiny(LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": Tiny(Qwen2Config, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}),
    "qwen3": Tiny(Qwen3Config, {"head_dim": 16}),
    "gemma2": Tiny(
        Gemma2Config,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 9,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        finish=lambda logits: 3 * torch.tanh(logits / 3),
    ),
    "granite": Tiny(
        GraniteConfig,
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
        embedding_scale=3.0,
        finish=lambda logits: logits / 2,
    ),
    "phi3": Tiny(Phi3Config, {"sliding_window": 9}),
    "gemma": Tiny(GemmaConfig, {"head_dim": 16}),
    "gemma3_text": Tiny(
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            },
            "final_logit_softcapping": 3.0,
        },
        finish=lambda logits: 3 * torch.tanh(logits / 3),
    ),
    "smollm3": Tiny(
        SmolLM3Config, {"no_rope_layers": [1, 1, 0, 1, 0, 1], "use_sliding_window": True, "sliding_window": 9}
    ),
    "olmo2": Tiny(Olmo2Config),
    "ministral": Tiny(
        MinistralConfig,
        {"head_dim": 8, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 3},
    ),
    "ministral3": Tiny(
        Ministral3Config,
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 8,
                "max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
            "max_position_embeddings": 128,
        },
    ),
    "glm4": Tiny(Glm4Config, {"head_dim": 16, "attention_bias": True}),
    "exaone4": Tiny(
        Exaone4Config,
        {"sliding_window": 9, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
    ),
    "seed_oss": Tiny(
        SeedOssConfig,
        {
            "head_dim": 16,
            "attention_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
        },
    ),
    "hunyuan_v1_dense": Tiny(
        HunYuanDenseV1Config,
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
        },
    ),
    "ernie4_5": Tiny(Ernie4_5Config, {"head_dim": 16, "use_bias": True}),
    "arcee": Tiny(ArceeConfig, {"attention_bias": True, "mlp_bias": True}),
}
FIRST = ("mistral", "qwen3", "gemma2")
"""Those that every test runs on. Of the others, only what can go wrong by their arithmetic is a quick test."""
ESSENTIAL = pytest.mark.parametrize("backbone", BACKBONES, scope="module")
THOROUGH = pytest.mark.parametrize(
    "backbone",
    [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in BACKBONES],
    scope="module",
)


def write_raw(name, tokenizer, path, auto=AutoModelForCausalLM, **values):
    """A raw checkpoint, or another of `auto`, with its tokenizer."""
    torch.manual_seed(0)
    tiny = BACKBONES[name]
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    model = auto.from_config(tiny.config(**common | tiny.values | values))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
                parameter += 0.3 * torch.randn_like(parameter)
            assert parameter.isfinite().all(), parameter_name
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def layer_wise(path, **changes):
    """The re-ranker that a raw checkpoint becomes, with exits from the second layer on."""
    config = read_config(path)
    for name, value in ({"layer_wise": True, "start_layer": 2, "head_token_id": HEAD_TOKEN} | changes).items():
        setattr(config, name, value)
    return causal_lm_class(config).from_pretrained(path, config=config).eval()


def let_heads_differ(model):
    """Change the head of each exit, which all start from the same words, by its own draw."""
    torch.manual_seed(1)
    with torch.no_grad():
        for head in model.lm_head:
            head.linear_head.weight += 0.1 * torch.randn_like(head.linear_head.weight)
