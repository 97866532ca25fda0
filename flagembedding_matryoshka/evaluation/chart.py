"""Quality against cost as an SVG whose points can be hovered over and walked through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 44
TICKS = 5


@dataclass(frozen=True)
class Point:
    """A setting, or a baseline that costs something.

    Attributes:
        row: of the table, which is marked with it.
        cost, quality: where it stands.
        text: what is said of it.
        group: the number of its width, by which it is coloured; None for a baseline.
        is_cascade, on_front, is_fused: how it is drawn.
    """

    row: str
    cost: float
    quality: float
    text: str
    group: int | None
    is_cascade: bool = False
    on_front: bool = False
    is_fused: bool = False


def chart(points: Sequence[Point], levels: Sequence[tuple[str, float]], x_label: str, y_label: str) -> str:
    """An `<svg>`, the points in the order of their costs.

    Args:
        levels: name and quality of what costs nothing.
    """
    points = sorted(points, key=lambda point: (point.cost, point.quality))
    right = max(point.cost for point in points) * 1.05
    qualities = [*(point.quality for point in points), *(quality for _, quality in levels)]
    margin = 0.08 * (max(qualities) - min(qualities)) or 0.05
    low, high = min(qualities) - margin, max(qualities) + margin

    def x(cost: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * cost / right

    def y(quality: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (quality - low) / (high - low)

    bottom, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for value in ticks(0.0, right):
        parts.append(f'<path class="grid" d="M{x(value):.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{end}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{(LEFT + end) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">')
    parts.append(f"{escape(y_label)}</text>")
    for name, quality in levels:
        parts.append(f'<path class="level" d="M{LEFT} {y(quality):.1f}H{end}"/>')
        parts.append(f'<text x="{end}" y="{y(quality) - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    front = [point for point in points if point.on_front]
    if front:
        steps = "".join(f"H{x(point.cost):.1f}V{y(point.quality):.1f}" for point in front[1:])
        parts.append(f'<path class="front" d="M{x(front[0].cost):.1f} {y(front[0].quality):.1f}{steps}H{end}"/>')
    parts += [_mark(point, x(point.cost), y(point.quality)) for point in points]
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two values, some `TICKS` of them.

    >>> ticks(0.0, 13.5)
    [0.0, 5.0, 10.0]
    """
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _mark(point: Point, x: float, y: float) -> str:
    """Draw a circle, for a cascade a diamond, for a baseline a square; hollow if scores are fused."""
    kind = ("baseline" if point.group is None else f"group{point.group % 6}") + (" fused" if point.is_fused else "")
    shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    if point.is_cascade:
        shape = f'<path d="M{x:.1f} {y - 8:.1f}l8 8-8 8-8-8z"/>'
    elif point.group is None:
        shape = f'<path d="M{x - 6:.1f} {y - 6:.1f}h12v12h-12z"/>'
    return (
        f'<g class="point {kind}" tabindex="0" role="img" aria-label="{escape(point.text)}" data-row="{point.row}">'
        f"<title>{escape(point.text)}</title>{shape}</g>"
    )
