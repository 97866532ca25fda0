"""Freed memory that stays with the process."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

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
