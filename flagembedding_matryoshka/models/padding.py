"""Ordinary batches, padded and checked, made packed ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flagembedding_matryoshka.models.packing import PackedBatch


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    query_lengths: Sequence[int] | Tensor | None = None,
    prompt_lengths: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, PackedBatch]:
    """Drop the padding of an ordinary batch. Right- and left-padded rows are both understood.

    Args:
        input_ids: (batch, length) int64.
        attention_mask: (batch, length), non-zero on tokens; None means no padding.
        query_lengths, prompt_lengths: (batch,) lengths of the parts; without them no passage is known.

    Returns:
        token ids (1, total_tokens) and where the sequences lie among them.

    Raises:
        ValueError: on rows that are empty or padded in the middle, and on part lengths that do not fit.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be (batch, length) with at least one token, got {tuple(input_ids.shape)}.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)} differ in shape."
        )
    mask = attention_mask.cpu() != 0
    lengths = mask.sum(1)
    _refuse_broken_rows(mask, lengths)

    if query_lengths is None or prompt_lengths is None:
        if query_lengths is not None or prompt_lengths is not None:
            raise ValueError("query_lengths and prompt_lengths go together: give both or neither.")
        query, prompt = lengths, torch.zeros_like(lengths)
    else:
        query = _part_lengths("query_lengths", query_lengths, len(lengths))
        prompt = _part_lengths("prompt_lengths", prompt_lengths, len(lengths))
    passage = lengths - query - prompt
    if (passage < 0).any():
        row = int(torch.nonzero(passage < 0)[0])
        raise ValueError(
            f"row {row} has {int(lengths[row])} tokens, fewer than query_lengths {int(query[row])} + "
            f"prompt_lengths {int(prompt[row])}."
        )
    packed = PackedBatch(query, passage, prompt, input_ids.device)
    return input_ids[mask.to(input_ids.device)][None], packed


def _refuse_broken_rows(mask: Tensor, lengths: Tensor) -> None:
    if (lengths == 0).any():
        raise ValueError(f"row {int(torch.nonzero(lengths == 0)[0])} of the batch has no token.")
    # A row that is one run of tokens changes from padding to token, or back, once on each side at most.
    starts = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if (starts > 1).any():
        raise ValueError(f"row {int(torch.nonzero(starts > 1)[0])} of attention_mask has padding between tokens.")


def _part_lengths(name: str, lengths: Sequence[int] | Tensor, batch_size: int) -> Tensor:
    values = torch.as_tensor(lengths).cpu().long()
    if values.shape != (batch_size,):
        raise ValueError(f"{name} must hold one length for each of the {batch_size} rows, got {tuple(values.shape)}.")
    if (values < 0).any():
        raise ValueError(f"{name} must not be negative, got {int(values.min())} in row {int(values.argmin())}.")
    return values
