"""Attention with capped logits in one compiled kernel for a packed row: flex attention (Dong et al., 2024,
https://arxiv.org/abs/2412.05496)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flagembedding_matryoshka.models.batch import PackedBatch, ranges, row_indices, segment_indices
from flagembedding_matryoshka.private import compiler_options

BLOCK = 128
"""Tokens of a block of `FlexIndices`."""
LEAST_HEAD = 16
GRAPHS = {"assume_static_by_default": True, "specialize_float": True, "recompile_limit": 64}
"""Options of the compiler. The cap is a constant of a graph, because a kernel cannot take it as an argument. A model
needs three graphs: for the first row, for other rows, and for rows of one block."""

_graphs_lock = Lock()


@cache
def _flex() -> tuple[Callable[..., Tensor], Callable[..., Any]] | None:
    """Return compiled attention and the function that makes its mask; None if torch cannot make a mask from blocks."""
    flex = import_module("torch.nn.attention.flex_attention")
    make_mask = flex.BlockMask.from_kv_blocks
    if not {"seq_lengths", "compute_q_blocks"} <= signature(make_mask).parameters.keys():
        return None
    # fullgraph=True raises if it cannot be compiled. Without compilation the square of the row would lie in memory.
    return torch.compile(flex.flex_attention, fullgraph=True), make_mask


def runs_flex(query: Tensor) -> bool:
    """Return whether `flex_attention` is used for queries (…, head_dim). On a CPU other attention is faster."""
    return query.device.type == "cuda" and query.shape[-1] >= LEAST_HEAD and _flex() is not None


class FlexIndices(NamedTuple):
    """Indices of the kernel.

    Attributes:
        segments, prefixes: (total_tokens,) int64: the segment of each token, and the segment that this one continues,
            or the same.
        counts: (blocks,) int32: the number of blocks of the row that each block attends to.
        blocks: (blocks, blocks) int32: these blocks, the earliest first, and 0 after them.
    """

    segments: Tensor
    prefixes: Tensor
    counts: Tensor
    blocks: Tensor


def flex_indices(packed: PackedBatch) -> FlexIndices:
    firsts, lasts = packed.cu_seqlens[:-1] // BLOCK, (packed.cu_seqlens[1:] - 1) // BLOCK
    spans = lasts - firsts + 1
    segments = torch.repeat_interleave(spans)
    rows = firsts[segments] + ranges(spans)
    # +1 where a segment's context begins to be seen from a row, -1 after its end
    count = int(lasts[-1]) + 1
    edges = torch.zeros(count, count + 1, dtype=torch.int32)
    one = torch.ones_like(rows, dtype=torch.int32)
    edges.index_put_((rows, firsts[segments]), one, accumulate=True)
    edges.index_put_((rows, rows + 1), -one, accumulate=True)
    if packed.prefixes is not None:
        continued = packed.prefixes[segments] >= 0
        rows, one, prefixes = rows[continued], one[continued], packed.prefixes[segments][continued]
        edges.index_put_((rows, firsts[prefixes]), one, accumulate=True)
        edges.index_put_((rows, lasts[prefixes] + 1), -one, accumulate=True)
    seen = edges.cumsum(1)[:, :-1] > 0
    counts = seen.sum(1)
    rows, columns = seen.nonzero().unbind(1)
    blocks = torch.zeros(count, count, dtype=torch.int32)
    blocks[rows, ranges(counts)] = columns.int()
    return FlexIndices(*segment_indices(packed), counts.int(), blocks)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedBatch,
    scaling: float,
    softcap: float,
    window: int | None,
) -> Tensor:
    """Compute causal attention of each segment's tokens to its context, without gradients. The first calls compile.

    Args:
        query: (1, heads, total_tokens, head_dim).
        key, value: (1, kv_heads, total_tokens, head_dim).
        window: number of tokens that a token attends to at most, including itself; None is all tokens before it.

    Returns:
        (1, total_tokens, heads, head_dim).
    """
    found = _flex()
    assert found is not None
    flex, make_mask = found
    positions = packed.indices(row_indices).position_ids[0]
    segments, prefixes, counts, blocks = packed.indices(flex_indices)
    earliest = torch.zeros_like(positions) if window is None else positions - (window - 1)
    # One tensor, because torch 2.13 generates code from four that a CPU's compiler refuses, also for another window.
    marks = torch.stack([segments, prefixes, positions, earliest])

    def capped(logit: Tensor, batch: Tensor, head: Tensor, of: Tensor, at: Tensor) -> Tensor:
        return softcap * torch.tanh(logit / softcap)

    def visible(batch: Tensor, head: Tensor, of: Tensor, at: Tensor) -> Tensor:
        in_context = (marks[0, at] == marks[0, of]) | (marks[0, at] == marks[1, of])
        return in_context & (marks[2, at] <= marks[2, of]) & (marks[2, at] >= marks[3, of])

    tokens = query.shape[2]
    mask = make_mask(
        counts[None, None],
        blocks[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )
    with _graphs_lock, compiler_options(GRAPHS):
        attended = flex(
            query,
            key,
            value,
            score_mod=capped,
            block_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return attended.transpose(1, 2).contiguous()
