"""How much fits into memory at once: found by trying, and tried again later."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from flagembedding_matryoshka.inference.batching import count_tokens
from flagembedding_matryoshka.text.pairs import TokenizedPair

logger = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = 16
"""Batches that must fit before twice as many tokens are tried; doubled each time that those were too many."""


class OutOfMemory(Exception):
    """A batch did not fit."""


def computed(batch: Callable[[], T]) -> T:
    """What `batch` returns; a shortage of memory on any device, a CPU included, is an `OutOfMemory`."""
    try:
        return batch()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        shortage = OutOfMemory(str(error))
    # Outside of the handler, whose error holds on to what the batch had computed.
    clear_device_cache()
    raise shortage


class TokenLimit:
    """Tokens of a batch that fit, as far as is known.

    Attributes:
        tokens: infinity until something does not fit.
    """

    def __init__(self) -> None:
        self.tokens: float = math.inf
        self._patience = PATIENCE
        self._fitted = 0
        self._has_grown = False

    def fitted(self) -> None:
        """A batch within the limit did. What was short for a while need not be short for ever."""
        self._fitted += 1
        if self._fitted >= self._patience:
            self.tokens, self._fitted, self._has_grown = 2 * self.tokens, 0, True

    def halve(self, part: Sequence[TokenizedPair], name: int, error: OutOfMemory) -> None:
        """From here on, at most half as many tokens as in `part`, which did not fit.

        Raises:
            torch.OutOfMemoryError: if it is a single pair, which is called `name`.
        """
        tokens = count_tokens(part)
        if len(part) == 1:
            raise torch.OutOfMemoryError(
                f"pair {name}, of {tokens} tokens, does not fit into memory alone. Lower max_length, or compress "
                f"earlier. ({error})"
            ) from error
        if self._has_grown:
            self._patience *= 2
        self.tokens, self._fitted, self._has_grown = tokens // 2, 0, False
        logger.warning("Out of memory with %d tokens in a batch; for now at most %d.", tokens, tokens // 2)
