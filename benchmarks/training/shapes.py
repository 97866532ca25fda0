"""The shapes of models whose training is measured; their weights are random."""

from __future__ import annotations

from typing import Any

from flagembedding_matryoshka import CostWiseMistralConfig
from flagembedding_matryoshka.models.backbones import CostWiseGraniteConfig, CostWiseQwen3Config
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.minicpm import granite_from_minicpm


def small_config(layers: int, hidden: int) -> CostWiseMistralConfig:
    """Mistral's proportions."""
    return CostWiseMistralConfig(layer_wise=True, sliding_window=None, **_small(layers, hidden))


def small_minicpm(layers: int, hidden: int) -> dict[str, Any]:
    """The same shape in the words of FlagEmbedding's layer-wise MiniCPM."""
    return _small(layers, hidden) | {
        "head_multi": True,
        "head_type": "simple",
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }


def small_granite_config(layers: int, hidden: int) -> CostWiseGraniteConfig:
    """`small_minicpm` as this package runs it."""
    return CostWiseGraniteConfig(**granite_from_minicpm(small_minicpm(layers, hidden)))


def _small(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "start_layer": max(1, layers // 4),
        "vocab_size": 1000,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    }


def big_configs() -> dict[str, CostWiseConfig]:
    """Of models that are trained on a GPU: Mistral-7B-v0.1 with the recipe's exits, and Qwen3-0.6B."""
    mistral = CostWiseMistralConfig(
        layer_wise=True,
        start_layer=4,
        vocab_size=32000,
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
        pad_token_id=0,
    )
    qwen3 = CostWiseQwen3Config(
        layer_wise=True,
        start_layer=4,
        vocab_size=151936,
        num_hidden_layers=28,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        pad_token_id=0,
    )
    return {"Mistral-7B": mistral, "Qwen3-0.6B": qwen3}
