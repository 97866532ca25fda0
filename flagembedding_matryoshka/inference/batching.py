"""Batches of pairs: which pairs go together, and how many tokens of them fit into memory."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from flagembedding_matryoshka.text.pairs import Prefix, TokenizedPair

logger = logging.getLogger(__name__)
PATIENCE = 16
"""After this many batches without an out-of-memory error the limit is doubled. Each time the doubled limit fails, this
number doubles too."""


def count_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Return the number of tokens of a batch, in which neighbours share their prefix."""
    before = [None, *(pair.prefix for pair in pairs)]
    return sum(pair.own_length if pair.prefix == one else pair.length for pair, one in zip(pairs, before, strict=False))


def cut_batches(pairs: Sequence[TokenizedPair], batch_size: int, max_tokens: float) -> Iterator[list[int]]:
    """Yield the indices of pairs in batches of at most `batch_size` pairs and `max_tokens` tokens, at least one pair.

    Pairs with one prefix stand together, the longest pairs and prefixes first.
    """
    lengths = [pair.length for pair in pairs]
    groups: dict[Prefix, list[int]] = {}
    for index in sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True):
        groups.setdefault(pairs[index].prefix, []).append(index)
    batch: list[int] = []
    tokens = 0
    for index in chain.from_iterable(groups.values()):
        pair = pairs[index]
        shares = bool(batch) and pairs[batch[-1]].prefix == pair.prefix
        tokens += pair.own_length if shares else pair.length
        if batch and (len(batch) == batch_size or tokens > max_tokens):
            yield batch
            batch, tokens = [], pair.length
        batch.append(index)
    if batch:
        yield batch


def count_input_tokens(pairs: Sequence[TokenizedPair]) -> tuple[int, list[int]]:
    """Count the tokens of one query's pairs.

    Returns:
        the number of tokens before the passages, which a batch holds once, and the number of each pair's other tokens.
    """
    shared = pairs[0].query_length if pairs else 0
    return shared, [pair.length - pair.query_length for pair in pairs]


class OutOfMemory(Exception):
    """A batch did not fit."""


def as_shortage(error: RuntimeError) -> OutOfMemory:
    """Return the shortage of memory that an error tells of. Raises the error itself if it is another one.

    The device may be a CPU, too. The error keeps the tensors of its batch alive: leave its handler before memory is
    used again.
    """
    if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
        raise error
    return OutOfMemory(str(error))


class TokenLimit:
    """The number of tokens of a batch that fit.

    Attributes:
        tokens: infinity until a batch does not fit. Until then `take` returns all pairs, and `fitted` has no effect.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tokens: float = math.inf
        self._patience = PATIENCE
        self._fitted = 0
        self._has_grown = False

    def take(self, pairs: Sequence[TokenizedPair]) -> Sequence[TokenizedPair]:
        """Return the first pairs of a batch, at least one, that fit as far as is known."""
        tokens, before = 0, None
        for count, pair in enumerate(pairs):
            tokens += pair.own_length if pair.prefix == before else pair.length
            if count and tokens > self.tokens:
                return pairs[:count]
            before = pair.prefix
        return pairs

    def fitted(self) -> None:
        """Note that a batch fitted. After enough of them a larger limit is tried, since memory may be free again."""
        with self._lock:
            self._fitted += 1
            if self._fitted >= self._patience:
                self.tokens, self._fitted, self._has_grown = 2 * self.tokens, 0, math.isfinite(self.tokens)

    def halve(self, part: Sequence[TokenizedPair], name: int, error: OutOfMemory, held: str = "") -> None:
        """Limit batches to half the tokens of `part`, which did not fit, and free cached memory.

        Args:
            name: number of the first pair, for the error.
            held: other content of the memory, for the error and the warning.

        Raises:
            torch.OutOfMemoryError: if `part` is a single pair.
        """
        clear_device_cache()
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
