"""A tiny checkpoint of each backbone, in which all that is different about it matters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
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
}


def write_raw(name, tokenizer, path, **values):
    """A raw checkpoint with its tokenizer."""
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
    model = AutoModelForCausalLM.from_config(tiny.config(**common | tiny.values | values))
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
