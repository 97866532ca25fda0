"""What a layer-wise model returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class CostWiseModelOutputWithPast(ModelOutput):
    """Hidden states of one pass; every tuple has one entry per cutoff layer, in the order asked for.

    Attributes:
        last_hidden_state: (batch, length, hidden), the last entry of `hidden_states`.
        last_token_states: tuple of (batch, hidden), normalised.
        hidden_states: tuple of (batch, length, hidden), normalised, zero where padded; None unless asked for.
        attention_masks: tuple of (batch, length) after compression, 1 on tokens; None unless asked for.
        full_width_states: as `last_token_states`, of the pass without compression and its graph; None for exits that
            are read before anything is compressed, where both passes are the same. None unless asked for.
    """

    last_hidden_state: Tensor | None = None
    last_token_states: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attention_masks: tuple[Tensor, ...] | None = None
    full_width_states: tuple[Tensor | None, ...] | None = None


@dataclass
class CostWiseCausalLMOutputWithPast(ModelOutput):
    """Scores of one pass; every tuple has one entry per cutoff layer, in the order asked for.

    Attributes:
        logits: tuple of (batch,) float32 scores.
        hidden_states: tuple of (batch, length, hidden), normalised, zero where padded; None unless asked for.
        attention_masks: tuple of (batch, length) after compression, 1 on tokens; None unless asked for.
        full_width_logits: as `logits`, without compression and without a graph; None unless asked for.
    """

    logits: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attention_masks: tuple[Tensor, ...] | None = None
    full_width_logits: tuple[Tensor, ...] | None = None
