"""Child processes, in which what was measured before leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.training.jobs import Job


def in_fresh_process(measure: Callable[..., dict[str, Any]], job: Job, *args: Any) -> dict[str, Any]:
    """`measure(job, *args)` in a process that has imported what it needs and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flagembedding_matryoshka.finetune.modeling", "peft"])
    with ProcessPoolExecutor(1, context, set_up_process, (job.threads,)) as pool:
        return pool.submit(measure, job, *args).result()


def set_up_process(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # transformers' own, on names that the trainer uses as well
