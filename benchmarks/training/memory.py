"""The most memory in use between two points in time."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h


def reset_peak(device: str) -> int:
    """Forget the peak so far; bytes in use now."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # elsewhere than on Linux what is measured is how far the steps raise the peak of the whole process
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def peak_bytes(device: str) -> int:
    """Most bytes in use since `reset_peak`: of tensors on a GPU, of the whole process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def hand_back_at_once() -> None:
    """Let glibc return what tensors leave, so that the process's memory is that in use and not what it holds back."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 65536)
