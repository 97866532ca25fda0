"""What the benchmarks have in common."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from flagembedding_matryoshka.evaluation.machine import machine

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def matrix_flops_per_second(device: str, dtype: torch.dtype, repeats: int = 20) -> float:
    """What a big product of square matrices reaches at its fastest."""
    size = MATRIX_SIZE[torch.device(device).type]
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on beside the code; a load above 0 at the start says that others were computing."""
    return machine([device]) | {"load_average": os.getloadavg()[0]}
