"""Attention with capped logits in one compiled kernel for a packed row: flex attention (Dong et al., 2024,
https://arxiv.org/abs/2412.05496)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from flagembedding_matryoshka.models.batch import BLOCK, PackedBatch
from flagembedding_matryoshka.private import compiler_options

LEAST_HEAD = 16
GRAPHS = {"assume_static_by_default": True, "specialize_float": True, "recompile_limit": 64}
"""Options of the compiler: one graph for each cap, and few graphs for all lengths. A kernel takes no other number as an
argument. A model needs three graphs: for the first row, for other rows, and for rows of one block."""

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
    positions = packed.position_ids[0]
    earliest = torch.zeros_like(positions) if window is None else positions - (window - 1)
    # One tensor, because torch 2.13 generates code from four that a CPU's compiler refuses, also for another window.
    marks = torch.stack([packed.segment_ids, packed.prefix_ids, positions, earliest])

    def capped(logit: Tensor, batch: Tensor, head: Tensor, of: Tensor, at: Tensor) -> Tensor:
        return softcap * torch.tanh(logit / softcap)

    def visible(batch: Tensor, head: Tensor, of: Tensor, at: Tensor) -> Tensor:
        in_context = (marks[0, at] == marks[0, of]) | (marks[0, at] == marks[1, of])
        return in_context & (marks[2, at] <= marks[2, of]) & (marks[2, at] >= marks[3, of])

    counts, blocks = packed.context_blocks
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
