"""What is measured: a model of some shape, a batch, and the sub-networks it is trained under."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from flagembedding_matryoshka import CostWiseMistralConfig, Setting
from flagembedding_matryoshka.finetune.sampling import sample_setting

RATIOS = (1, 2, 4, 8)
QUERY_LENGTH, PASSAGE_LENGTHS, PROMPT_LENGTH = 32, (64, 192), 14
SEEDS = (14, 12, 0, 31, 3, 28, 8, 32)
"""Of sub-networks: with three compress layers these draws hold every ratio twice, and a layer in half of them."""


@dataclass(frozen=True)
class Job:
    """What a child process measures.

    Attributes:
        config: the shape of the model; layers are compressed after every `start_layer` of them.
        queries, group: pairs in a batch.
        steps: training steps, each under a sub-network of its own.
    """

    config: CostWiseMistralConfig
    queries: int
    group: int
    steps: int
    device: str
    threads: int
    dtype: torch.dtype
    checkpointing: bool

    @property
    def compress_layers(self) -> list[int]:
        return list(range(self.config.start_layer, self.config.num_hidden_layers, self.config.start_layer))

    @property
    def settings(self) -> list[Setting]:
        """One per step, the same for every job of a shape."""
        seeds = itertools.islice(itertools.cycle(SEEDS), self.steps)
        return [sample_setting(self.config, self.compress_layers, RATIOS, seed, step=0) for seed in seeds]


def small_config(layers: int, hidden: int) -> CostWiseMistralConfig:
    """Mistral's proportions."""
    return CostWiseMistralConfig(
        layer_wise=True,
        start_layer=max(1, layers // 4),
        vocab_size=1000,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        pad_token_id=0,
    )


def seven_b_config() -> CostWiseMistralConfig:
    """Mistral-7B-v0.1's shape and the recipe's exits."""
    return CostWiseMistralConfig(
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


def make_batch(job: Job) -> dict[str, Any]:
    """Random tokens and teacher scores, as the trainer hands them to the model."""
    generator = torch.Generator().manual_seed(0)
    pairs = job.queries * job.group
    shortest, longest = PASSAGE_LENGTHS
    lengths = QUERY_LENGTH + torch.randint(shortest, longest + 1, (pairs,), generator=generator) + PROMPT_LENGTH
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    pair = {
        "input_ids": torch.randint(1, job.config.vocab_size, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "query_lengths": torch.full((pairs,), QUERY_LENGTH),
        "prompt_lengths": torch.full((pairs,), PROMPT_LENGTH),
    }
    return {
        "pair": {name: value.to(job.device) for name, value in pair.items()},
        "teacher_scores": torch.randn(pairs, generator=generator).tolist(),
    }
