"""What is fast on a device: the dtype, the number of threads, and the number of tokens in a batch."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import joblib
import torch

logger = logging.getLogger(__name__)

# Names in torch.cpu.get_capabilities(): x86 tiles, x86 vectors, Arm.
_CPU_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

MOST_TOKENS = 65_536
MOST_VALUES = 2**26
"""Values in the hidden states of a batch, at most."""
LEAST_TOKENS_OF_A_THREAD = 2048
CACHE = 2**20
"""Assumed bytes of a core's second-level cache, if torch does not know them."""


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """Return bfloat16 if `device` has instructions for it, otherwise float32.

    A processor without them also runs bfloat16, several times slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        # none on an unknown processor: float32 is fast on all of them
        has_bfloat16 = any(_capabilities().get(name) for name in _CPU_BFLOAT16)
    elif kind == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = False
    return torch.bfloat16 if has_bfloat16 else torch.float32


def warn_of_slow_bfloat16(dtype: torch.dtype, device: str | torch.device) -> None:
    """Warn if a model computes in bfloat16 on a CPU without instructions for it.

    On an Intel Xeon with AVX-512, VNNI and no such instructions, a thread multiplied 2,048 rows by a matrix of 576 ×
    1,536 at 32 GFLOP/s, and in float32 at 135.
    """
    if dtype == torch.bfloat16 and torch.device(device).type == "cpu" and fast_dtype(device) != dtype:
        warnings.warn(
            "bfloat16 is several times slower than float32 on this processor, which has no instructions for it: leave "
            "it out.",
            UserWarning,
            stacklevel=3,
        )


def _capabilities() -> Mapping[str, Any]:
    """Return what torch knows of the processor; older releases know nothing."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def follow_cpu_quota() -> None:
    """Let torch compute with no more threads than this process has processors, by its container's quota and affinity.

    torch starts with a thread for each core of the machine. A container with a limit of 2 processors on a machine of 64
    cores would be stopped for most of each period. Nothing changes if `OMP_NUM_THREADS` is set.
    """
    processors = joblib.cpu_count()
    if "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() <= processors:
        return
    logger.info("The process has %d processors: torch gets no more threads than that.", processors)
    torch.set_num_threads(processors)


def threads_of_each(devices: Sequence[str]) -> int:
    """Return the number of threads for each of `devices` that is a CPU."""
    on_cpu = sum(torch.device(device).type == "cpu" for device in devices)
    return max(1, torch.get_num_threads() // max(1, on_cpu))


def fast_batch_tokens(device: str | torch.device, dtype: torch.dtype, hidden_size: int, threads: int) -> int:
    """Return the number of tokens in a batch that keeps an accelerator, or each thread of a CPU, busy.

    For a narrow model on a CPU, its hidden states about fill the cache of a thread. `benchmarks.batch_tokens` measured
    512 to 8,192 tokens a thread. With a hidden size of 576, 2,048 and 4,096 were about the fastest at full width, and
    2,048 with compression. For a hidden size of 128, 2,048 were in float32, and 4,096 in bfloat16. On an H200, 65,536
    tokens kept a model with hidden size 1,024 busy, and 16,384 did not. With hidden size 4,096, 16,384 tokens were as
    fast as more.

    Args:
        threads: number of threads that compute a batch, if `device` is a CPU.
    """
    most = min(MOST_TOKENS, MOST_VALUES // hidden_size)
    if torch.device(device).type != "cpu":
        return most
    cached = (_capabilities().get("l2_cache_size") or CACHE) / (hidden_size * dtype.itemsize)
    # To a power of two, so that processors with similar caches cut the same batches.
    return min(most, threads * max(LEAST_TOKENS_OF_A_THREAD, 2 ** round(math.log2(cached))))


def check_devices(devices: Sequence[str]) -> None:
    """Raise ValueError if a name is no device, or this machine does not have the device."""
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"devices has {name!r}, but must have names such as 'cpu', 'cuda:0' or 'mps'.") from error
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ValueError(f"devices has {name!r}, but torch finds {count} CUDA devices on this machine.")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ValueError(f"devices has {name!r}, but torch finds no Apple GPU on this machine.")


def check_batch_invariance(devices: Sequence[str], dtype: torch.dtype, quantization: str | None, compile: bool) -> None:
    """Raise ValueError if scores would depend on their batch in spite of `batch_invariant`.

    In float32 a row of a product depends, by 1e-7, on its place among the others.
    """
    kinds = {torch.device(device).type for device in devices}
    if (kinds, dtype, quantization, compile) != ({"cpu"}, torch.bfloat16, None, False):
        raise ValueError(
            "batch_invariant runs in bfloat16 on a CPU, with weights that are neither quantized nor compiled, but "
            f"devices are {list(devices)}, dtype is {dtype}, quantization is {quantization!r} and compile is {compile}."
        )


def resolve_dtype(
    dtype: str | torch.dtype,
    use_fp16: bool,
    use_bf16: bool,
    device: str | torch.device,
    quantization: str | None = None,
) -> torch.dtype:
    """Return the dtype that weights are loaded in.

    Args:
        dtype: "auto", a torch dtype or its name.
        use_fp16, use_bf16: FlagEmbedding's arguments for float16 and bfloat16. On a CPU `use_fp16` has no effect:
            float16 is slow there, its sums overflow, and callers of FlagEmbedding set it by default.
        quantization: quantization of the weights; with "int8", "auto" is float32.

    Raises:
        ValueError: if they contradict each other or name another format.
    """
    if quantization == "int8" and dtype == "auto" and not use_bf16:
        dtype = "float32"
    flagged = [torch.bfloat16] * use_bf16
    if use_fp16 and torch.device(device).type != "cpu":
        flagged.append(torch.float16)
    if dtype == "auto" and not flagged:
        return fast_dtype(device)
    if dtype != "auto":
        named = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
        if named not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}, but must be 'auto', 'float32', 'bfloat16', 'float16' or 'float64'.")
        flagged.append(named)
    if len(set(flagged)) > 1:
        raise ValueError(f"dtype={dtype!r}, use_fp16={use_fp16} and use_bf16={use_bf16} contradict each other.")
    return flagged[0]
