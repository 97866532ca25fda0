"""Batches of pairs: which pairs go together, and how many tokens of them fit into memory."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from flagembedding_matryoshka.text.pairs import Prefix, TokenizedPair

logger = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = 16
"""After this many batches without an out-of-memory error the limit is doubled. Each time the doubled limit fails, this
number doubles too."""


def by_prefix(pairs: Sequence[TokenizedPair]) -> list[int]:
    """Return the indices of all pairs, pairs with one prefix together, the longest pairs and prefixes first."""
    lengths = list(map(len, pairs))
    groups: dict[Prefix, list[int]] = {}
    for index in sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True):
        groups.setdefault(pairs[index].prefix, []).append(index)
    return list(chain.from_iterable(groups.values()))


def count_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Return the number of tokens of a batch, in which neighbours share their prefix."""
    before = [None, *(pair.prefix for pair in pairs)]
    return sum(pair.own_length if pair.prefix == one else len(pair) for pair, one in zip(pairs, before, strict=False))


def cut_batches(
    pairs: Sequence[TokenizedPair], batch_size: int, max_tokens: float, order: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Yield the indices of pairs in batches of at most `batch_size` pairs and `max_tokens` tokens, at least one pair.

    Args:
        order: the indices of pairs in the order of the batches; None is the order of `by_prefix`.
    """
    batch: list[int] = []
    tokens = 0
    for index in by_prefix(pairs) if order is None else order:
        pair = pairs[index]
        shares = bool(batch) and pairs[batch[-1]].prefix == pair.prefix
        tokens += pair.own_length if shares else len(pair)
        if batch and (len(batch) == batch_size or tokens > max_tokens):
            yield batch
            batch, tokens = [], len(pair)
        batch.append(index)
    if batch:
        yield batch


def count_input_tokens(pairs: Sequence[TokenizedPair]) -> tuple[int, list[int]]:
    """Count the tokens of one query's pairs.

    Returns:
        the number of tokens before the passages, which a batch holds once, and the number of each pair's other tokens.
    """
    shared = pairs[0].query_length if pairs else 0
    return shared, [len(pair) - pair.query_length for pair in pairs]


class OutOfMemory(Exception):
    """A batch did not fit."""


def computed(batch: Callable[[], T]) -> T:
    """Return the result of `batch`. Raises OutOfMemory if any device, also a CPU, lacks memory."""
    try:
        return batch()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        shortage = OutOfMemory(str(error))
    # Outside of the handler, whose error keeps the tensors of the batch alive.
    clear_device_cache()
    raise shortage


class TokenLimit:
    """The number of tokens of a batch that fit.

    Attributes:
        tokens: infinity until a batch does not fit.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tokens: float = math.inf
        self._patience = PATIENCE
        self._fitted = 0
        self._has_grown = False

    def take(self, pairs: Sequence[TokenizedPair]) -> Sequence[TokenizedPair]:
        """Return the first pairs of a batch, at least one, that fit as far as is known."""
        if self.tokens == math.inf:
            return pairs
        return pairs[: len(next(cut_batches(pairs, len(pairs), self.tokens, range(len(pairs)))))]

    def fitted(self) -> None:
        """Note that a batch fitted. After enough of them a larger limit is tried, since memory may be free again."""
        with self._lock:
            self._fitted += 1
            if self._fitted >= self._patience:
                self.tokens, self._fitted, self._has_grown = 2 * self.tokens, 0, math.isfinite(self.tokens)

    def halve(self, part: Sequence[TokenizedPair], name: int, error: OutOfMemory, held: str = "") -> None:
        """Limit batches to half the tokens of `part`, which did not fit.

        Args:
            name: number of the first pair, for the error.
            held: other content of the memory, for the error and the warning.

        Raises:
            torch.OutOfMemoryError: if `part` is a single pair.
        """
        tokens = count_tokens(part)
        if len(part) == 1:
            raise torch.OutOfMemoryError(
                f"pair {name}, of {tokens} tokens, does not fit into memory alone{held}. Lower max_length, or compress "
                f"earlier. ({error})"
            ) from error
        with self._lock:
            if self._has_grown:
                self._patience *= 2
            self.tokens, self._fitted, self._has_grown = tokens // 2, 0, False
        logger.warning("Out of memory with %d tokens in a batch%s; for now at most %d.", tokens, held, tokens // 2)
