"""Checkpoints of several shapes, with random weights."""

from __future__ import annotations

import torch

from flagembedding_matryoshka import CostWiseMistralConfig, CostWiseMistralForCausalLM
from flagembedding_matryoshka.models.loading import load_tokenizer
from flagembedding_matryoshka.models.shipped import SMOLLM2_BASE_NAME

SHAPES = {"4x128": (4, 128), "16x512": (16, 512), "24x1024": (24, 1024)}


def config_of(layers: int, hidden: int) -> CostWiseMistralConfig:
    """Mistral's proportions, an exit at every quarter of the depth, the vocabulary of the shipped re-ranker's base."""
    return CostWiseMistralConfig(
        layer_wise=True,
        start_layer=layers // 4,
        layer_sep=layers // 4,
        vocab_size=len(load_tokenizer(SMOLLM2_BASE_NAME)),
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=2048,
        sliding_window=None,
    )


def write_checkpoint(config: CostWiseMistralConfig, path: str) -> None:
    """Random weights that tell passages apart; the last head is the one that the plain cross-encoder has."""
    torch.manual_seed(0)
    model = CostWiseMistralForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.normal_(std=weight.shape[1] ** -0.5)
    model.save_pretrained(path)
    load_tokenizer(SMOLLM2_BASE_NAME).save_pretrained(path)
