"""What a training run has cost so far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flagembedding_matryoshka.models.batch import PackedBatch
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.flops import estimate_flops
from flagembedding_matryoshka.setting import Setting

COUNTED = ("lists", "tokens", "operations", "seconds")


class Effort:
    """Counts the passes of one process from where a resumed run had come.

    Args:
        trains_all_weights: whether the weights of the network learn, whose gradients take as much as a pass.
        teaches_itself: whether a pass without compression and gradient runs beside one that compresses.
        imitates: whether such a pass of the original model runs beside every one.
    """

    def __init__(
        self, config: CostWiseConfig, trains_all_weights: bool, teaches_itself: bool, imitates: bool = False
    ) -> None:
        self.config = config
        self.passes = 3 if trains_all_weights else 2
        self.teaches_itself = teaches_itself
        self.imitates = imitates
        self.started = time.monotonic()
        self.lists = self.tokens = self.operations = 0

    def add(self, packed: PackedBatch, group: int, setting: Setting) -> None:
        """Count a pass, forward and backward, over groups of `group` pairs; adapters are left out, which are small."""
        prompt = packed.prompt_lengths[packed.sequences]
        passage = packed.passage_lengths[packed.sequences]
        query = packed.sequence_lengths - passage - prompt
        parts = (query, passage, prompt)
        shares_prefix = torch.arange(len(query)) % group > 0
        deepest = (setting.depth,)
        self.lists += len(query) // group
        self.tokens += int(packed.sequence_lengths.sum())
        self.operations += self.passes * estimate_flops(self.config, setting, *parts, shares_prefix, read_alone=deepest)
        if self.imitates:
            self.operations += estimate_flops(self.config, Setting.resolve(self.config), *parts, shares_prefix)
        first = next((layer for layer in setting.compress_layers if setting.compresses_after(layer)), None)
        if self.teaches_itself and first is not None:
            full = Setting(setting.cutoff_layers)
            self.operations += estimate_flops(
                self.config, full, *parts, shares_prefix, layers_run=first, read_alone=deepest
            )

    def totals(self, history: Sequence[Mapping[str, Any]], counts: Tensor) -> dict[str, float]:
        """Lists, tokens, floating-point operations and seconds from the first step of the run on.

        Args:
            history: what an earlier part of the run has logged.
            counts: (3,) of this part, see `counts`, summed over all processes.
        """
        logged = (logs for logs in reversed(history) if all(name in logs for name in COUNTED))
        before: Mapping[str, Any] = next(logged, {})
        spent = [*counts.tolist(), time.monotonic() - self.started]
        return {name: float(before.get(name, 0)) + value for name, value in zip(COUNTED, spent, strict=True)}

    def counts(self, device: torch.device) -> Tensor:
        """(3,) float64: lists, tokens and operations of this process, since the run was started or resumed."""
        return torch.tensor([self.lists, self.tokens, self.operations], dtype=torch.float64, device=device)
