"""What the benchmarks have in common."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from typing import Any

import torch

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
    on_gpu = torch.device(device).type == "cuda"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    processor = capabilities.get("cpu_name", platform.processor())
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else str(processor),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("flagembedding_matryoshka", "torch", "transformers", "peft")},
    }
