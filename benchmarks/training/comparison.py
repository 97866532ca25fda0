"""Ours against the baselines, setting by setting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.training.jobs import Job
from benchmarks.training.measurements import SIDES, measure_alone, measure_memory, measure_time
from benchmarks.training.processes import in_fresh_process
from benchmarks.training.report import HEADER, alone_row, table_row
from benchmarks.training.shapes import big_configs
from flagembedding_matryoshka.inference.device import fast_dtype


def compare(job: Job) -> dict[str, Any]:
    """Time and memory of both sides in one setting, and ours as a share of the baseline's."""
    result = in_fresh_process(measure_time, job)
    for side in SIDES:
        result[side] |= in_fresh_process(measure_memory, job, side)
    ours, baseline = result["ours"], result["baseline"]
    return {
        "compared": job.compared,
        "dtype": str(job.dtype).removeprefix("torch."),
        "gradient_checkpointing": job.checkpointing,
        **result,
        "time_ratio": ours["total_s"] / baseline["total_s"],
        "memory_ratio": ours["peak_above_mib"] / baseline["peak_above_mib"],
    }


def compare_all(jobs: list[Job]) -> dict[str, Any]:
    """Every setting of every job, and a row of the table for each."""
    print(HEADER)
    settings, skipped = [], []
    for dtype in (torch.float32, torch.bfloat16):
        device = jobs[0].device
        if dtype == torch.bfloat16 and fast_dtype(device) != dtype:
            reason = f"this {device} has no instructions for bfloat16"
            skipped.append({"dtype": "bfloat16", "reason": reason})
            print(f"bfloat16 is skipped: {reason}.", flush=True)
            continue
        for job in jobs:
            for checkpointing in (False, True):
                result = compare(replace(job, dtype=dtype, checkpointing=checkpointing))
                settings.append(result)
                print(table_row(result), flush=True)
    return {"settings": settings, "skipped": skipped}


def big_ones(job: Job) -> dict[str, Any]:
    """Ours alone in bfloat16, with gradient checkpointing, in the shapes that are trained on a GPU."""
    found = {}
    for name, config in big_configs().items():
        big = replace(job, config=config, dtype=torch.bfloat16, checkpointing=True)
        found[name] = in_fresh_process(measure_alone, big)
        print(alone_row(name, found[name]), flush=True)
    return found
