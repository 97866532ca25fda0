"""What a child process measures of a job."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import matrix_flops_per_second
from benchmarks.training.jobs import Job
from benchmarks.training.learner import Learner
from benchmarks.training.memory import MIB, hand_back_at_once, peak_bytes, reset_peak
from benchmarks.training.sides import SIDES
from flagembedding_matryoshka import Setting

TOLERANCE = 1e-4


def disagreement(learners: dict[str, Learner], setting: Setting) -> dict[str, float]:
    """How far loss and gradient norm of the sides are apart, relative to the baseline's."""
    loss = {side: learner.learn(setting) for side, learner in learners.items()}
    norm = {side: learner.gradient_norm() for side, learner in learners.items()}
    return {
        "loss": abs(loss["ours"] - loss["baseline"]) / abs(loss["baseline"]),
        "gradient_norm": abs(norm["ours"] - norm["baseline"]) / norm["baseline"],
    }


def measure_time(job: Job) -> dict[str, Any]:
    """Seconds per step of both sides, which take turns, after a pass that warms up and compares them.

    Raises:
        RuntimeError: if they compute different numbers in float32.
    """
    learners = {side: Learner(job, side) for side in SIDES}
    one_per_ratio = {setting.compress_ratio: setting for setting in job.settings}
    apart = [disagreement(learners, setting) for setting in one_per_ratio.values()]
    worst = {name: max(each[name] for each in apart) for name in apart[0]}
    if job.dtype == torch.float32 and not max(worst.values()) <= TOLERANCE:
        raise RuntimeError(f"the two sides compute different numbers, relative differences are {worst}")
    for learner in learners.values():
        learner.optimizer.step()

    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for index, setting in enumerate(job.settings):
        for side in sorted(SIDES, reverse=index % 2 == 0):
            seconds[side].append(learners[side].step(setting))
    return {"differences": worst, **{side: summary(values) for side, values in seconds.items()}}


def summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "total_s": sum(seconds),
        "steps_s": seconds,
    }


def measure_memory(job: Job, side: str) -> dict[str, float]:
    """What the steps of one side need above what lay in memory before them."""
    hand_back_at_once()
    learner = Learner(job, side)
    before = reset_peak(job.device)
    for setting in job.settings:
        learner.step(setting)
    return {"before_mib": before / MIB, "peak_above_mib": (peak_bytes(job.device) - before) / MIB}


def measure_alone(job: Job) -> dict[str, Any]:
    """Ours by itself: tokens per second, memory, and how much of the device's matrix speed the steps reach.

    Arithmetic is counted as it is done, with what gradient checkpointing does twice.
    """
    learner = Learner(job, "ours")
    before = reset_peak(job.device)
    with FlopCounterMode(display=False) as counter:
        for setting in job.settings:
            learner.learn(setting)
    learner.optimizer.step()
    seconds = [learner.step(setting) for setting in job.settings]
    peak = peak_bytes(job.device)
    tokens = int(learner.batch["pair"]["attention_mask"].sum())
    speed = counter.get_total_flops() / sum(seconds)
    del learner
    matrix_speed = matrix_flops_per_second(job.device, job.dtype)
    return {
        "ours": summary(seconds),
        "tokens_per_step": tokens,
        "tokens_per_s": tokens * job.steps / sum(seconds),
        "tflops_per_s": speed / 1e12,
        "matrix_tflops_per_s": matrix_speed / 1e12,
        "share_of_matrix_peak": speed / matrix_speed,
        "before_mib": before / MIB,
        "peak_mib": peak / MIB,
    }
