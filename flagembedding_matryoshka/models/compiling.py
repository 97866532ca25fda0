"""Compiled decoder layers: attention over a packed row is one opaque operation in the graph of a layer."""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from flagembedding_matryoshka.models.attention import packed_attention
from flagembedding_matryoshka.models.batch import PackedBatch

OPAQUE_ATTENTION = "cost_wise_packed_opaque"
_batches: WeakValueDictionary[int, PackedBatch] = WeakValueDictionary()


def name_of(packed: PackedBatch) -> Tensor:
    """Return a () int64 CPU tensor that stands for a batch in a graph, as long as the batch exists.

    It is a tensor because a graph does not depend on the values of tensors. A number could become a constant.
    """
    _batches[id(packed)] = packed
    return torch.tensor(id(packed))


@torch.library.custom_op("flagembedding_matryoshka::packed_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Tensor,
    last_row: bool,
    only_last: bool,
    scaling: float,
    dropout: float,
    softcap: float | None,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    rows: list[Tensor] | None = [] if last_row else None
    attended, _ = packed_attention(
        None,
        query,
        key,
        value,
        None,
        scaling,
        _batches[int(packed)],
        rows,
        only_last,
        compiled=True,
        dropout=dropout,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    return attended, rows[0] if rows else _row(query, 0)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, packed: Tensor, last_row: bool, *others: Any) -> tuple[Tensor, Tensor]:
    _, heads, tokens, _ = query.shape
    return query.new_empty(1, tokens, heads, value.shape[3]), _row(query, tokens if last_row else 0)


def _row(query: Tensor, tokens: int) -> Tensor:
    return query.new_empty(tokens, dtype=torch.float32)


def opaque_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    packed: Tensor,
    last_rows: list[Tensor] | None = None,
    only_last: bool = False,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    use_cache: Literal[False] | None = None,
) -> tuple[Tensor, None]:
    """Run `packed_attention` without gradients; `packed` is the tensor that `name_of` returned for the batch."""
    attended, row = _attention(
        query, key, value, packed, last_rows is not None, only_last, scaling, dropout, softcap, sliding_window
    )
    if last_rows is not None:
        last_rows.append(row)
    return attended, None


AttentionInterface.register(OPAQUE_ATTENTION, opaque_attention)
