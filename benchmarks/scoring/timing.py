"""The time that settings take, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks.measuring import synchronize
from benchmarks.scoring.settings import Workload


def take_turns(settings: Sequence[Workload], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call, by setting."""
    seconds: dict[str, list[float]] = {setting.name: [] for setting in settings}
    for number in tqdm(range(-1, rounds), desc="rounds", leave=False):
        for setting in settings if number % 2 else reversed(settings):
            synchronize(device)
            start = time.perf_counter()
            setting.score()
            synchronize(device)
            if number >= 0:
                seconds[setting.name].append(time.perf_counter() - start)
    return seconds
