"""Checkpoints of several shapes, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.models.backbones import (
    CostWiseGemma2Config,
    CostWiseLlamaConfig,
    CostWiseMistralConfig,
    CostWiseQwen3Config,
    causal_lm_class,
)
from flagembedding_matryoshka.models.configuration import CostWiseConfig


def mistral_like(layers: int, hidden: int) -> dict[str, Any]:
    """Mistral's proportions."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "sliding_window": None,
    }


def shape(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }


SHAPES: dict[str, tuple[type[CostWiseConfig], dict[str, Any]]] = {
    "4x128": (CostWiseMistralConfig, mistral_like(4, 128)),
    "16x512": (CostWiseMistralConfig, mistral_like(16, 512)),
    "24x1024": (CostWiseMistralConfig, mistral_like(24, 1024)),
    "qwen3-4x128": (CostWiseQwen3Config, shape(4, 128, 384, 2, 1, head_dim=64)),
    "smollm2-135m": (CostWiseLlamaConfig, shape(30, 576, 1536, 9, 3)),
    "qwen3-0.6b": (CostWiseQwen3Config, shape(28, 1024, 3072, 16, 8, head_dim=128)),
    "gemma2-2b": (
        CostWiseGemma2Config,
        shape(26, 2304, 9216, 8, 4, head_dim=256, sliding_window=4096, final_logit_softcapping=None),
    ),
    "qwen3-4b": (CostWiseQwen3Config, shape(36, 2560, 9728, 32, 8, head_dim=128)),
    "qwen3-8b": (CostWiseQwen3Config, shape(36, 4096, 12288, 32, 8, head_dim=128)),
    "mistral-7b": (CostWiseMistralConfig, shape(32, 4096, 14336, 32, 8, sliding_window=None)),
}
"""What the configurations of published models say of a decoder, and small ones of their kinds. Scores have no cap."""


def config_of(name: str, vocabulary: int) -> CostWiseConfig:
    """One of `SHAPES`, with an exit at every quarter of the depth."""
    kind, decoder = SHAPES[name]
    quarter = decoder["num_hidden_layers"] // 4
    return kind(
        **decoder,
        layer_wise=True,
        exits=[quarter, 2 * quarter, 3 * quarter, decoder["num_hidden_layers"]],
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def write_checkpoint(
    config: CostWiseConfig,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Random weights that tell passages apart; the last head is the one that the plain cross-encoder has."""
    torch.manual_seed(0)
    with torch.device(device):
        model = causal_lm_class(config)._from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.normal_(std=weight.shape[1] ** -0.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
