"""Peak memory of some work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_memory(work: Callable[[], object], devices: Sequence[str]) -> int | None:
    """Do `work` and return the bytes that were in use at its height.

    On a CUDA device they are what torch had allocated there; on a CPU what the process had resident: Python, the
    weights and also what was freed and not returned to the system. Elsewhere, and of several devices, whose workers
    are processes of their own, they are not known: None.
    """
    if len(devices) > 1:
        work()
        return None
    device = torch.device(devices[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    resettable = device.type == "cpu" and _reset_high_water_mark()
    work()
    return _high_water_mark() if resettable else None


def _reset_high_water_mark() -> bool:
    """Linux alone can, see proc_pid_clear_refs(5)."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
