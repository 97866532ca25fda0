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
KEPT_PRODUCTS = 32
"""Products whose code is kept on a CPU. A layer has about seven, and a compressed batch has a few numbers of rows."""


@cache
def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory for the next pass, in this process and from now on.

    By default it returns every large block to the system, and the next operation faults it in again page by page:
    a million faults per 100 pairs with the shipped re-ranker. All threads share one arena, because others map blocks
    above 64 MiB. The process then holds the memory of its largest pass until it ends.

    malloc stays as it is if a variable of the environment already configures it (`MALLOC_…` or `GLIBC_TUNABLES`), or if
    the C library is not glibc.

    oneDNN, and torch's layer around it, keep the code of 1,024 products each. Every number of rows needs its own, and
    batches of all sizes took 700 MB. They keep `KEPT_PRODUCTS` each, unless the environment says otherwise or they have
    computed already.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_PRODUCTS))
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
