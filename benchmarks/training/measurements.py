"""What a child process measures of a job."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.measuring import matrix_flops_per_second
from benchmarks.training.jobs import Job, pair_lengths
from benchmarks.training.learner import Learner
from benchmarks.training.memory import MIB, hand_back_at_once, peak_bytes, reset_peak
from flagembedding_matryoshka import Setting

TOLERANCE = 1e-4
SIDES = ("ours", "baseline")


def disagreement(learners: dict[str, Learner], setting: Setting) -> dict[str, float]:
    """How far loss and gradient norm of the sides are apart, relative to the baseline's."""
    loss = {side: learner.learn(setting, counted=True) for side, learner in learners.items()}
    norm = {side: learner.gradient_norm() for side, learner in learners.items()}
    return {
        "loss": abs(loss["ours"] - loss["baseline"]) / abs(loss["baseline"]),
        "gradient_norm": abs(norm["ours"] - norm["baseline"]) / norm["baseline"],
    }


def measure_time(job: Job) -> dict[str, Any]:
    """Seconds per step of both sides, which take turns, after passes that warm up and compare them.

    Raises:
        RuntimeError: if they compute different numbers in float32.
    """
    learners = {side: Learner(job, side) for side in SIDES}
    apart = [disagreement(learners, setting) for setting in dict.fromkeys(job.settings)]
    worst = {name: max(each[name] for each in apart) for name in apart[0]}
    if job.dtype == torch.float32 and not max(worst.values()) <= TOLERANCE:
        raise RuntimeError(f"the two sides compute different numbers, relative differences are {worst}")
    for learner in learners.values():
        learner.optimizer.step()

    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for index, setting in enumerate(job.settings):
        for side in sorted(SIDES, reverse=index % 2 == 0):
            seconds[side].append(learners[side].step(setting))
    matrix_speed = layer_matrix_speed(job)
    return {
        "differences": worst,
        "matrix_tflops_per_s": matrix_speed / 1e12,
        **{side: summary(learners[side], values, matrix_speed) for side, values in seconds.items()},
    }


def layer_matrix_speed(job: Job) -> float:
    """Floating-point operations a second of the layers' biggest product by itself: all tokens into the MLP."""
    shape = (sum(pair_lengths(job)), job.config.hidden_size, job.config.intermediate_size)
    return matrix_flops_per_second(job.device, job.dtype, shape)


def summary(learner: Learner, seconds: list[float], matrix_speed: float) -> dict[str, Any]:
    """What a learner's steps took, of whose settings each has been counted."""
    done = sum(learner.operations[setting] for setting in learner.job.settings)
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "total_s": sum(seconds),
        "steps_s": seconds,
        "tokens_per_s": sum(pair_lengths(learner.job)) * len(seconds) / sum(seconds),
        "tflops_per_s": done / sum(seconds) / 1e12,
        "share_of_matrix_peak": done / sum(seconds) / matrix_speed,
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
    """Ours by itself: tokens per second, memory, and how much of the device's matrix speed the steps reach."""
    learner = Learner(job, "ours")
    before = reset_peak(job.device)
    for setting in dict.fromkeys(job.settings):
        learner.learn(setting, counted=True)
    learner.optimizer.step()
    seconds = [learner.step(setting) for setting in job.settings]
    peak = peak_bytes(job.device)
    matrix_speed = layer_matrix_speed(job)
    return summary(learner, seconds, matrix_speed) | {
        "matrix_tflops_per_s": matrix_speed / 1e12,
        "before_mib": before / MIB,
        "peak_mib": peak / MIB,
    }
