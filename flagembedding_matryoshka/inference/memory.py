"""Memory: batches that do not fit, and freed memory that stays with the process."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import threading
from collections.abc import Sequence
from functools import cache

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from flagembedding_matryoshka.text.pairs import TokenizedPair, count_tokens

logger = logging.getLogger(__name__)
PATIENCE = 16
"""After this many batches without an out-of-memory error the limit is doubled. Each time the doubled limit fails, this
number doubles too."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Numbers of mallopt's parameters in glibc's malloc.h (mallopt(3))."""
LARGEST_INT = 2**31 - 1
LARGEST_BLOCKS = (2**30, 2**25)
"""Values of M_MMAP_THRESHOLD, in bytes, the first that glibc takes. Before 2.35 it takes 32 MiB at most."""


@cache
def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory for the next pass, in this process and from now on.

    By default it returns every large block to the system, and the next operation faults it in again page by page:
    a million faults per 100 pairs with the shipped re-ranker. All threads share one arena, because others map blocks
    above 64 MiB. The process then holds the memory of its largest pass until it ends.

    Nothing is changed if a variable of the environment already configures malloc (`MALLOC_…` or `GLIBC_TUNABLES`), or
    if the C library is not glibc.
    """
    is_configured = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if is_configured or not _has_glibc():
        return
    set_option = ctypes.CDLL(None).mallopt
    set_option(M_ARENA_MAX, 1)
    set_option(M_TRIM_THRESHOLD, LARGEST_INT)
    largest, before_2_35 = LARGEST_BLOCKS
    if not set_option(M_MMAP_THRESHOLD, largest):
        set_option(M_MMAP_THRESHOLD, before_2_35)


def return_freed_memory() -> None:
    """Return the memory that `keep_freed_memory` keeps to the system, once. Without glibc nothing is done."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def as_shortage(error: RuntimeError) -> str:
    """Return the message of an error that tells of a shortage of memory. Raises the error itself if it is another one.

    The device may be a CPU, too. The error keeps the tensors of its batch alive: leave its handler before memory is
    used again.
    """
    if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
        raise error
    return str(error)


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

    def halve(self, part: Sequence[TokenizedPair], name: int, shortage: str, held: str = "") -> None:
        """Limit batches to half the tokens of `part`, which did not fit, and free cached memory.

        Args:
            name: number of the first pair, for the error.
            shortage: what `as_shortage` returns, for the error.
            held: other content of the memory, for the error and the warning.

        Raises:
            torch.OutOfMemoryError: if `part` is a single pair.
        """
        clear_device_cache()
        tokens = count_tokens(part)
        if len(part) == 1:
            raise torch.OutOfMemoryError(
                f"pair {name}, of {tokens} tokens, does not fit into memory alone{held}. Lower max_length, or compress "
                f"earlier. ({shortage})"
            )
        with self._lock:
            if self._has_grown:
                self._patience *= 2
            self.tokens, self._fitted, self._has_grown = tokens // 2, 0, False
        logger.warning("Out of memory with %d tokens in a batch%s; for now at most %d.", tokens, held, tokens // 2)
