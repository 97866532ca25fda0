"""Decoder layers that run on a packed row, for all tokens or for the last token of each segment."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from flagembedding_matryoshka.models.batch import PackedBatch, row_indices
from flagembedding_matryoshka.models.compiling import name_of


class ContextEnd(Exception):
    """A layer has computed the keys and values of its row, and nothing else of it is needed."""


class Context:
    """Keys and values of a whole row, for a layer that runs for the last tokens alone.

    The layer takes it for its `transformers.Cache` and calls `update` between projections and attention:

        first pass, all tokens:   layer → q k v → update keeps k, v → ContextEnd, no attention
        second pass, last tokens: layer → q k v → update returns the kept k, v → attention → output
    """

    states: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *layer: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values of all tokens, (1, kv_heads, total_tokens, head_dim) each."""
        if self.states is None:
            self.states = keys, values
            raise ContextEnd
        return self.states


class CostWiseLayer(GradientCheckpointingLayer):
    """Base class before a decoder layer of transformers, which then runs on a packed row.

    Attributes:
        is_compiled: whether the pass for all tokens is compiled. The pass for the last tokens is not.
    """

    is_compiled = False

    def forward(
        self, hidden_states: Tensor, *args: Any, last_row: bool = False, only_last: bool = False, **kwargs: Any
    ) -> Any:
        """Run the layer.

        Args:
            last_row: also return the last tokens' attention row, as an output that gradient checkpointing sees.
            only_last: run for the last token of each segment alone. Of the other tokens only keys and values are
                computed.

        Returns:
            (1, total_tokens, hidden), or with `only_last` (1, segments, hidden), and the attention row or None.
        """
        packed: PackedBatch = kwargs.pop("packed")
        attended = name_of(packed) if self.is_compiled else packed
        positions, ends, _, _ = packed.indices(row_indices)
        if not only_last:
            return self._all_tokens(
                hidden_states, *args, packed=attended, position_ids=positions, last_row=last_row, **kwargs
            )
        rotary, context = kwargs.pop("position_embeddings"), Context()
        with suppress(ContextEnd):
            whole = super().forward(
                hidden_states,
                position_embeddings=rotary,
                position_ids=positions,
                packed=attended,
                past_key_values=context,
                **kwargs,
            )
            return whole[:, ends], None  # the layer has no keys and values
        output = super().forward(
            hidden_states[:, ends],
            position_embeddings=tuple(part[:, ends] for part in rotary),
            position_ids=positions[:, ends],
            packed=attended,
            past_key_values=context,
            only_last=True,
            **kwargs,
        )
        return output, None

    def _all_tokens(self, hidden: Tensor, *args: Any, last_row: bool, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        rows: list[Tensor] | None = [] if last_row else None
        output = super().forward(hidden, *args, last_rows=rows, **kwargs)
        return output, rows[0] if rows else None
