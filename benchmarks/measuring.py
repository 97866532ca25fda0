"""What the benchmarks have in common."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flagembedding_matryoshka.evaluation.results import machine
from flagembedding_matryoshka.models.onednn import OneDnnLinear, use_onednn

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def matrix_flops_per_second(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int] | None = None, repeats: int = 20
) -> float:
    """What a product of matrices (rows, inner) and (inner, columns) reaches at its fastest.

    On a CPU the fastest of the products at hand is taken: torch's, and oneDNN's with the second matrix in its order.

    Args:
        shape: rows, inner and columns; None is a big square.
    """
    rows, inner, columns = shape or (MATRIX_SIZE[torch.device(device).type],) * 3
    left, right = (
        torch.randn(rows, inner, device=device).to(dtype),
        torch.randn(inner, columns, device=device).to(dtype),
    )
    products: list[Callable[[], Any]] = [lambda: left @ right]
    linear = nn.Sequential(nn.Linear(inner, columns, bias=False, device=device, dtype=dtype))
    use_onednn(linear)
    if isinstance(linear[0], OneDnnLinear):
        products.append(lambda: linear(left))
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            for compute in products:
                synchronize(device)
                start = time.perf_counter()
                compute()
                synchronize(device)
                seconds.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / min(seconds)


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on beside the code; a load above 0 at the start says that others were computing."""
    return machine([device]) | {"load_average": os.getloadavg()[0]}
