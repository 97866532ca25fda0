"""Which number format and how many tokens at a time a device computes fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Names in torch.cpu.get_capabilities(): x86 tiles, x86 vectors, Arm.
_CPU_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")

MOST_TOKENS = 65_536
MOST_VALUES = 2**26
"""Of a batch's hidden states."""
LEAST_TOKENS_OF_A_THREAD = 1024
CACHE = 2**20
"""Bytes of a core's second-level cache, where torch does not know them."""


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where `device` has instructions for it, else float32.

    A processor without them still runs bfloat16, tens of times slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        # of an unknown processor none: float32 is fast on all of them
        has_bfloat16 = any(_capabilities().get(name) for name in _CPU_BFLOAT16)
    elif kind == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = False
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _capabilities() -> Mapping[str, Any]:
    """What is known of the processor; nothing by torch releases that cannot tell."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def threads_of_each(devices: Sequence[str]) -> int:
    """Threads that a CPU has for each of `devices` that is one."""
    on_cpu = sum(torch.device(device).type == "cpu" for device in devices)
    return max(1, torch.get_num_threads() // max(1, on_cpu))


def fast_batch_tokens(device: str | torch.device, dtype: torch.dtype, hidden_size: int, threads: int) -> int:
    """Tokens in a batch: as many as keep an accelerator or each thread of a CPU busy; of a narrow model as many as have
    hidden states that about fill the thread's cache.

    Of a thread 1,024 were about the fastest of 512 to 8,192 for models that are 512 to 1,024 wide, and at a width of
    128 two (float32) and four times as many (bfloat16; `benchmarks.batch_tokens`). On an H200 65,536 tokens of a model
    1,024 wide kept it busy where 16,384 waited to be launched, and 16,384 of one 4,096 wide were as fast as more.

    Args:
        threads: that compute a batch, where `device` is a CPU.
    """
    most = min(MOST_TOKENS, MOST_VALUES // hidden_size)
    if torch.device(device).type != "cpu":
        return most
    cached = (_capabilities().get("l2_cache_size") or CACHE) / (hidden_size * dtype.itemsize)
    # To a power of two, so that processors with similar caches cut the same batches.
    return min(most, threads * max(LEAST_TOKENS_OF_A_THREAD, 2 ** round(math.log2(cached))))


def check_batch_invariance(devices: Sequence[str], dtype: torch.dtype, quantization: str | None, compile: bool) -> None:
    """Raise ValueError where scores that do not depend on the batch are not to be had.

    A row of a product in float32 depends, by 1e-7, on its place among the others.
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
    """The format that weights are loaded in.

    Args:
        dtype: "auto", a torch dtype or its name.
        use_fp16, use_bf16: FlagEmbedding's way to say float16 or bfloat16. On a CPU, where float16 is slow and its
            sums overflow, `use_fp16` leaves the choice to `dtype`: it is a default of FlagEmbedding's callers.
        quantization: of the weights; "auto" is float32 beside "int8".

    Raises:
        ValueError: if they contradict each other or name no floating-point format.
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
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise ValueError(f"dtype is {dtype!r}, but must be 'auto', 'float32', 'bfloat16' or 'float16'.")
        flagged.append(named)
    if len(set(flagged)) > 1:
        raise ValueError(f"dtype={dtype!r}, use_fp16={use_fp16} and use_bf16={use_bf16} contradict each other.")
    return flagged[0]
