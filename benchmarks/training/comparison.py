"""Ours against the baseline, setting by setting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.training.jobs import Job
from benchmarks.training.measurements import measure_memory, measure_time
from benchmarks.training.processes import in_fresh_process
from benchmarks.training.report import HEADER, table_row
from benchmarks.training.sides import SIDES
from flagembedding_matryoshka.inference.device import fast_dtype


def compare(job: Job) -> dict[str, Any]:
    """Time and memory of both sides in one setting, and ours as a share of the baseline's."""
    result = in_fresh_process(measure_time, job)
    for side in SIDES:
        result[side] |= in_fresh_process(measure_memory, job, side)
    ours, baseline = result["ours"], result["baseline"]
    return {
        "dtype": str(job.dtype).removeprefix("torch."),
        "gradient_checkpointing": job.checkpointing,
        **result,
        "time_ratio": ours["total_s"] / baseline["total_s"],
        "memory_ratio": ours["peak_above_mib"] / baseline["peak_above_mib"],
    }


def compare_all(job: Job) -> dict[str, Any]:
    """Every setting, and a row of the table for each."""
    print(HEADER)
    settings, skipped = [], []
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and fast_dtype(job.device) != dtype:
            reason = f"this {job.device} has no instructions for bfloat16"
            skipped.append({"dtype": "bfloat16", "reason": reason})
            print(f"bfloat16 is skipped: {reason}.", flush=True)
            continue
        for checkpointing in (False, True):
            result = compare(replace(job, dtype=dtype, checkpointing=checkpointing))
            settings.append(result)
            print(table_row(result), flush=True)
    return {"settings": settings, "skipped": skipped}
