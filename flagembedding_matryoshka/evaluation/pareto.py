"""Settings that nothing beats in cost and quality at once."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, quality) whether no other is at most as costly and at least as good, and better in one."""
    on_front = [False] * len(points)
    last = (0.0, -math.inf)
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if points[index][1] > last[1] or points[index] == last:
            on_front[index], last = True, points[index]
    return on_front
