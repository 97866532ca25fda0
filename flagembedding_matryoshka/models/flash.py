"""Attention of a packed row in one kernel call on GPUs: flash attention with segments of unequal lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flagembedding_matryoshka.models.batch import PackedBatch

FORMATS = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
FIRST_CAPABILITY = (8, 0)


def _flash() -> Callable[..., Any] | None:
    """Return torch's kernel; None if this release has none with scales and windows."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    flash = import_module("torch.nn.attention.varlen").varlen_attn
    known = signature(flash).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None
    # For keys that several heads share. torch 2.11 accepts them without the argument.
    return partial(flash, enable_gqa=True) if "enable_gqa" in known else flash


FLASH = _flash()


def runs_flash(query: Tensor) -> bool:
    """Return whether `flash_attention` can run with queries (…, head_dim)."""
    return (
        FLASH is not None
        and query.device.type == "cuda"
        and torch.version.hip is None
        and _format(query) in FORMATS
        and query.shape[-1] <= LARGEST_HEAD
        and torch.cuda.get_device_capability(query.device) >= FIRST_CAPABILITY
    )


def _format(query: Tensor) -> torch.dtype:
    """Return the dtype that attention is computed in."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype


class FlashIndices(NamedTuple):
    """Indices of the kernel.

    Attributes:
        cu_seqlens_q: (segments + 1,) int32: where each segment's queries start, and the row's length.
        cu_seqlens_k: (segments + 1,) int32: where each segment's context starts in `context`.
        numbers: (segments + 1,) int32: `cu_seqlens_q` of segments of one token each.
        context: (sum of context lengths,) int64: the tokens of the contexts; None if no segment continues another.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    numbers: Tensor
    context: Tensor | None


def flash_indices(packed: PackedBatch) -> FlashIndices:
    return FlashIndices(
        packed.cu_seqlens.int(),
        torch.cat([packed.lengths.new_zeros(1), packed.context_lengths.cumsum(0)]).int(),
        torch.arange(len(packed.lengths) + 1, dtype=torch.int32),
        None if packed.prefixes is None else packed.context_tokens,
    )


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedBatch,
    scaling: float,
    window: int | None,
    only_last: bool = False,
) -> Tensor:
    """Compute causal attention of each segment's tokens to its context, which ends with the segment itself.

    Args:
        query: (1, heads, total_tokens, head_dim), in one of `FORMATS`, or under autocast to one; with `only_last` (1,
            heads, segments, head_dim), that of each segment's last token.
        key, value: (1, kv_heads, total_tokens, head_dim).
        window: number of tokens that a token attends to at most, including itself; None is all tokens before it.

    Returns:
        (1, tokens of the query, heads, head_dim), in the dtype of the computation.
    """
    assert FLASH is not None
    queries, keys, values = (part[0].transpose(0, 1).to(_format(query)) for part in (query, key, value))
    indices = packed.indices(flash_indices)
    if indices.context is not None:
        keys, values = keys[indices.context], values[indices.context]
    return FLASH(
        queries,
        keys,
        values,
        indices.numbers if only_last else indices.cu_seqlens_q,
        indices.cu_seqlens_k,
        1 if only_last else int(packed.lengths.max()),
        int(packed.context_lengths.max()),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )[None]
