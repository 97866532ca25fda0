"""Decoder layers that run on a packed row, of which no more is computed than is read."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from flagembedding_matryoshka.models.batch import PackedBatch
from flagembedding_matryoshka.models.compiling import name_of


class ContextKnown(Exception):
    """A layer has computed the keys and values of its row: where nothing else of it is wanted, it ends here."""


class Context:
    """Keys and values of a whole row for the last tokens alone: what a layer takes for its `transformers.Cache`.

    The first time that a layer brings keys and values they are kept, and `ContextKnown` is raised; from then on they
    are what it gets, whatever it brings.
    """

    def __init__(self) -> None:
        self.states: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *layer: Any) -> tuple[Tensor, Tensor]:
        """Keys and values, (1, kv_heads, total_tokens, head_dim) each."""
        if self.states is None:
            self.states = keys, values
            raise ContextKnown
        return self.states


class CostWiseLayer(GradientCheckpointingLayer):
    """In front of a decoder layer: it runs on a packed row.

    Attributes:
        is_compiled: whether torch fuses what is computed of all tokens; what is of the last ones alone stays as it is.
    """

    is_compiled = False

    def forward(
        self, hidden_states: Tensor, *args: Any, last_row: bool = False, only_last: bool = False, **kwargs: Any
    ) -> Any:
        """The layer's output and, where `last_row`, the last tokens' attention row; else None.

        The row is a second output rather than a side effect so that gradient checkpointing sees it.

        Args:
            only_last: the output is (1, segments, hidden), that of each segment's last token, and of the others
                nothing but keys and values is computed.
        """
        if only_last:
            return self._last_tokens(hidden_states, **kwargs), None
        packed = kwargs.pop("packed")
        attended = self._attended(packed)
        return self._all_tokens(
            hidden_states, *args, packed=attended, position_ids=packed.position_ids, last_row=last_row, **kwargs
        )

    def _attended(self, packed: PackedBatch) -> PackedBatch | Tensor:
        """What attention gets."""
        return name_of(packed) if self.is_compiled else packed

    def _all_tokens(self, hidden: Tensor, *args: Any, last_row: bool, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        rows: list[Tensor] | None = [] if last_row else None
        output = super().forward(hidden, *args, last_rows=rows, **kwargs)
        return output, rows[0] if rows else None

    def _last_tokens(self, hidden: Tensor, position_embeddings: tuple[Tensor, ...], packed: PackedBatch) -> Tensor:
        context, ends, attended = Context(), packed.segment_ends, self._attended(packed)
        positions = packed.position_ids
        with suppress(ContextKnown):
            whole = super().forward(
                hidden,
                position_embeddings=position_embeddings,
                position_ids=positions,
                packed=attended,
                past_key_values=context,
            )
            return whole[:, ends]  # of a layer that keeps no keys and values
        return super().forward(
            hidden[:, ends],
            position_embeddings=tuple(part[:, ends] for part in position_embeddings),
            position_ids=positions[:, ends],
            packed=attended,
            past_key_values=context,
            only_last=True,
        )
