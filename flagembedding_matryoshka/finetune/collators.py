"""From groups of tokenised pairs to one packed row: nothing is padded, and all lengths stay on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flagembedding_matryoshka.finetune.evaluation import PADDING
from flagembedding_matryoshka.models.batch import PackedBatch
from flagembedding_matryoshka.models.packing import pack_pairs
from flagembedding_matryoshka.text.pairs import TokenizedPair

Group = tuple[Sequence[TokenizedPair], Sequence[float] | None]
"""What a dataset gives: the pairs of a query, and a number for each or None."""


@dataclass(frozen=True)
class PackedPairs:
    """Pairs as a model takes them. accelerate and a data loader move it as they move a tensor.

    Attributes:
        token_ids: (1, total_tokens) int64.
        packed: where the pairs lie among them; neighbours with the same query part share it.
    """

    token_ids: Tensor
    packed: PackedBatch

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedPairs:
        """The same with its token ids on `device`, where `packed` will put its index tensors, too."""
        token_ids = self.token_ids.to(device, non_blocking=non_blocking)
        return PackedPairs(token_ids, replace(self.packed, device=token_ids.device))

    def pin_memory(self) -> PackedPairs:
        """The same with its token ids in pinned memory, from where a copy to a GPU does not wait."""
        return PackedPairs(self.token_ids.pin_memory(), self.packed)


def pack_groups(groups: Sequence[Group]) -> PackedPairs:
    """The pairs of all groups, one behind the other, on the CPU."""
    return PackedPairs(*pack_pairs(list(chain.from_iterable(pairs for pairs, _ in groups)), torch.device("cpu")))


class MatryoshkaCollator:
    """Packs several groups of training."""

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """`pair`, `PackedPairs`, and `teacher_scores`, (pairs,) float32 or None."""
        scores = [scores for _, scores in groups if scores is not None]
        return {
            "pair": pack_groups(groups),
            "teacher_scores": torch.tensor(list(chain.from_iterable(scores))) if scores else None,
        }


class MatryoshkaEvalCollator:
    """Packs several lists, which may differ in length."""

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """`pair` as in training, and `labels` (lists, longest list) with PADDING behind the shorter ones."""
        labels = [torch.tensor(labels) for _, labels in groups]
        return {
            "pair": pack_groups(groups),
            "labels": pad_sequence(labels, batch_first=True, padding_value=PADDING),
        }
