"""Draw the figures of the documentation into docs/figures.

    python docs/drawings.py

`imports` draws the picture of docs/imports.md; docs/hooks.py calls it when the site is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path

FIGURES = Path(__file__).with_name("figures")
BOXES = {
    "query": ("#c6dbef", "#6b8fb3", "#27466b", "#7ba3d0"),
    "passage": ("#fdd0a2", "#c98a4b", "#6b4a22", "#d9a066"),
    "prompt": ("#c7e9c0", "#6fa967", "#2c5a33", "#7fbf7f"),
    "layer": ("#f2f2f2", "#999999", "#30343d", "#888888"),
    "padding": ("#ffffff", "#bbbbbb", "#1f2129", "#555b66"),
}
"""Fill and stroke, on light and on dark paper."""
TEXTS = {"ink": ("#1f2328", "#e6e6e6"), "muted": ("#656d76", "#a2abb8")}
LINES = {"arrow": ("#444444", "#c0c6cf"), "thin": ("#999999", "#7d8590")}
PAPER = ("#ffffff", "#1f2129")


def style(dark: bool) -> str:
    """The colours of one scheme."""
    rules = [f".paper{{fill:{PAPER[dark]}}}", f".head{{fill:{LINES['arrow'][dark]}}}"]
    rules += [f".{name}{{fill:{pair[2 * dark]};stroke:{pair[2 * dark + 1]}}}" for name, pair in BOXES.items()]
    rules += [f".{name}{{fill:{pair[dark]}}}" for name, pair in TEXTS.items()]
    rules += [f".{name}{{fill:none;stroke:{pair[dark]}}}" for name, pair in LINES.items()]
    return "".join(rules)


class Drawing:
    """An SVG on its own paper, which is dark if the reader's colour scheme is."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._size = f"{width:g} {height:g}"
        self._title = title
        self._elements: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str, words: str = "") -> None:
        size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        dashes = ' stroke-dasharray="3 3"' if kind == "padding" else ""
        self._elements.append(f'<rect {size} rx="3" class="{kind}"{dashes}/>')
        if words:
            self.text(x + width / 2, y + height / 2 + 5, words)

    def text(self, x: float, y: float, words: str, kind: str = "ink", anchor: str = "middle") -> None:
        size = ' font-size="13"' if kind == "muted" else ""
        self._elements.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}"{size}>{escape(words)}</text>'
        )

    def path(self, commands: str, kind: str = "thin") -> None:
        head = ' stroke-width="1.4" marker-end="url(#head)"' if kind == "arrow" else ""
        self._elements.append(f'<path d="{commands}" class="{kind}"{head}/>')

    def cells(self, x: float, y: float, size: float, cells: Sequence[tuple[str, str]], height: float = 24) -> float:
        """Draw (kind, words) side by side; return the x of their end."""
        for kind, words in cells:
            self.box(x, y, size - 2, height, kind, words)
            x += size
        return x

    def legend(self, x: float, y: float, kinds: Sequence[str]) -> None:
        for kind in kinds:
            self.box(x, y - 11, 14, 14, kind)
            self.text(x + 20, y, kind, "muted", "start")
            x += 96

    def __str__(self) -> str:
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._size}" font-family="sans-serif" '
                'font-size="15" role="img">',
                f"<title>{escape(self._title)}</title>",
                f"<style>{style(False)}@media (prefers-color-scheme: dark){{{style(True)}}}</style>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                'orient="auto"><path d="M0 0L8 4L0 8z" class="head"/></marker></defs>',
                '<rect width="100%" height="100%" class="paper"/>',
                *self._elements,
                "</svg>\n",
            )
        )


def one_pass() -> Drawing:
    """Exits and compression in one pass of 32 layers."""
    drawing = Drawing(830, 330, "One pass: a score after any exit, passage tokens that merge on the way")
    left, step = 190, 38
    for y, passage in ((272, 6), (192, 3), (112, 3), (32, 3)):
        drawing.cells(left, y, step, [("query", "")] * 2)
        drawing.cells(left + 2 * step + 6, y, step * 6 / passage, [("passage", "")] * passage)
        drawing.cells(left + 8 * step + 12, y, step, [("prompt", "")] * 2)
    for y, words in ((228, "layers 1 to 8"), (148, "layers 9 to 16"), (68, "layers 17 to 32")):
        drawing.box(left - 6, y, 402, 32, "layer", words)
    for x, words in ((36, "query"), (194, "passage"), (352, "prompt")):
        drawing.text(left + x, 316, words)
    for y, words, kind in (
        (194, "compress_layers=[8]", "ink"),
        (211, "compress_ratio=2", "ink"),
        (226, "neighbours merge", "muted"),
    ):
        drawing.text(left - 16, y, words, kind, "end")
    for y, exit_, words in (
        (204, 8, "the layers above do not run"),
        (124, 16, "learns from the deeper exits"),
        (44, 32, "the full depth"),
    ):
        drawing.path(f"M{left + 398} {y}h56", "arrow")
        drawing.text(left + 464, y - 3, f"score, cutoff_layers=[{exit_}]", anchor="start")
        drawing.text(left + 464, y + 13, words, "muted", "start")
    return drawing


def packed_row() -> Drawing:
    """Three pairs as a padded batch and as one packed row."""
    drawing = Drawing(800, 330, "A padded batch of 27 cells and a packed row of 22 tokens")
    pairs = [(2, 6, 1), (2, 3, 1), (2, 4, 1)]
    tokens = [["query"] * query + ["passage"] * passage + ["prompt"] * prompt for query, passage, prompt in pairs]
    drawing.text(20, 26, "Padded batch: 3 × 9 = 27 cells, 5 of them padding", anchor="start")
    for index, kinds in enumerate(tokens):
        y = 40 + 28 * index
        drawing.text(20, y + 17, f"pair {index + 1}", "muted", "start")
        drawing.cells(70, y, 30, [(kind, "") for kind in kinds + ["padding"] * (9 - len(kinds))])
    drawing.legend(390, 57, ("query", "passage", "prompt", "padding"))

    drawing.text(20, 160, "Packed row: 22 tokens, no padding; the numbers are positions", anchor="start")
    starts = [0, *accumulate(map(len, tokens))]
    size, left = 34, 20
    for index, kinds in enumerate(tokens):
        first, last = left + size * starts[index], left + size * starts[index + 1] - 2
        drawing.cells(first, 176, size, [(kind, str(place)) for place, kind in enumerate(kinds)])
        drawing.path(f"M{first + 2} 208v7H{last - 2}v-7")
        drawing.text((first + last) / 2 - 20, 232, f"pair {index + 1} attends to itself alone", "muted")
        drawing.path(f"M{last - size / 2 + 1:g} 216v38", "arrow")
        drawing.text(last - size / 2 + 1, 270, f"score {index + 1}")
    drawing.text(20, 302, f"cu_seqlens = {starts}: where each segment starts, and the end", "ink", "start")
    drawing.text(20, 319, "The score of a pair is read from its last token.", "muted", "start")
    return drawing


def compression() -> Drawing:
    """Five passage tokens merged two to one."""
    drawing = Drawing(740, 330, "Compression with ratio 2: 5 passage tokens become 3")
    size, left = 76, 122
    kinds = ["query"] * 2 + ["passage"] * 5 + ["prompt"]
    names = ["q", "q", "a", "b", "c", "d", "e", "p"]
    weights = [0.1, 0.3, 0.2, 0.2, 0.15]
    drawing.text(20, 40, "attention of", "muted", "start")
    drawing.text(20, 55, "the last token", "muted", "start")
    for index, weight in enumerate(weights):
        x = left + size * (index + 2) + size / 2 - 1
        drawing.box(x - 10, 84 - 200 * weight, 20, 200 * weight, "layer")
        drawing.text(x, 78 - 200 * weight, f"{weight:.2f}", "muted")
    drawing.text(20, 118, "after layer 8", "ink", "start")
    drawing.cells(left, 100, size, list(zip(kinds, names, strict=True)), 30)
    slots = [0, 1, 2, 2, 3, 3, 4, 5]
    merged = ["q", "q", "¼ a + ¾ b", "½ c + ½ d", "e", "p"]
    for place, slot in enumerate(slots):
        start, end = left + size * place + size / 2 - 1, left + size * slot + size / 2 - 1
        drawing.path(f"M{start:g} 134C{start:g} 165 {end:g} 165 {end:g} 194", "arrow")
    drawing.text(20, 218, "into layer 9", "ink", "start")
    drawing.cells(left, 200, size, list(zip(["query"] * 2 + ["passage"] * 3 + ["prompt"], merged, strict=True)), 30)
    drawing.text(20, 252, "positions", "muted", "start")
    for place in range(6):
        drawing.text(left + size * place + size / 2 - 1, 252, str(place), "muted")
    for y, words, kind in (
        (286, "compress_layers=[8], compress_ratio=2: weights are normalised within each group of two.", "ink"),
        (
            306,
            "Query and prompt tokens stay. The last group may be short. The layers above run 6 tokens, not 8.",
            "muted",
        ),
    ):
        drawing.text(20, y, words, kind, "start")
    return drawing


def cascade() -> Drawing:
    """Ten candidates, three of which go deeper than exit 9 of 18 layers."""
    drawing = Drawing(760, 330, "A cascade: 10 candidates run 9 layers, the best 3 run 18")
    left, size, bottom, layer = 110, 34, 270, 13
    for index in range(10):
        x = left + size * index
        drawing.box(x, bottom - 9 * layer, size - 4, 9 * layer, "passage")
        if index < 3:
            drawing.box(x, bottom - 18 * layer, size - 4, 9 * layer - 3, "passage")
        top = bottom - layer * (18 if index < 3 else 9)
        drawing.text(x + size / 2 - 2, top - 7, str((2, 1)[index] if index < 2 else index + 1), "muted")
    for depth in (9, 18):
        y = bottom - depth * layer
        drawing.path(f"M{left - 8} {y - 1.5}H{left + 10 * size + 4}")
        drawing.text(left - 14, y + 4, f"exit {depth}", anchor="end")
    drawing.text(left + 5 * size, 290, "candidates in the order of exit 9; the numbers are final ranks", "muted")
    drawing.text(left + 5 * size, 316, "cascade={9: 0.3}, cutoff_layers=[18]")
    for y, words in ((170, "layers 10 to 18: 3 candidates"), (250, "layers 1 to 9: 10 candidates")):
        drawing.text(474, y - 40, words, anchor="start")
    drawing.text(474, 150, "0.5 of the layers · 0.3 = 0.15", "muted", "start")
    drawing.text(474, 230, "0.5 of the layers · 1.0 = 0.50", "muted", "start")
    drawing.text(474, 64, "operations: 0.65 of the full network's", anchor="start")
    return drawing


def shared_query() -> Drawing:
    """Three candidates of one query, whose tokens stand in the row once."""
    drawing = Drawing(760, 300, "A shared query: 17 tokens instead of 23")
    passages = [4, 3, 4]
    size, left = 34, 20
    drawing.text(20, 26, "Three pairs with their own copy of the query: 23 tokens", anchor="start")
    x = float(left)
    for passage in passages:
        kinds = ["query"] * 3 + ["passage"] * passage + ["prompt"]
        x = drawing.cells(x, 40, 28, [(kind, "") for kind in kinds]) + 8
    drawing.text(
        20, 108, "The query once, as a segment of its own: 17 tokens; the numbers are positions", anchor="start"
    )
    x = drawing.cells(left, 170, size, [("query", str(place)) for place in range(3)])
    middle = (left + x) / 2 - 1
    for index, passage in enumerate(passages):
        start = x + 10
        cells = [("passage", str(place + 3)) for place in range(passage)] + [("prompt", str(passage + 3))]
        x = drawing.cells(start, 170, size, cells)
        centre = (start + x) / 2 - 1
        top = 152 - 12 * index
        drawing.path(f"M{centre:g} 166C{centre:g} {top} {middle:g} {top} {middle:g} 166", "arrow")
        drawing.path(f"M{start + 2:g} 202v7H{x - 4:g}v-7")
        drawing.path(f"M{x - size / 2 - 1:g} 210v24", "arrow")
        drawing.text(x - size / 2 - 1, 250, f"score {index + 1}")
    words = "Each candidate attends to the query and to itself. The query's states do not depend on the candidate."
    drawing.text(20, 284, words, "muted", "start")
    return drawing


def levels(arrows: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The row of each name, counted from the top: below all that import it, and right above what it imports."""
    names = sorted({name for arrow in arrows for name in arrow})
    rows = dict.fromkeys(names, 0)
    for _ in names:
        for importer, imported in arrows:
            rows[imported] = max(rows[imported], rows[importer] + 1)
    for name in names:
        if name not in {imported for _, imported in arrows}:
            rows[name] = min(rows[imported] for importer, imported in arrows if importer == name) - 1
    return rows


def ways(arrows: Sequence[tuple[str, str]], rows: dict[str, int]) -> Iterator[list[tuple[str, int]]]:
    """Each arrow's places, one in every row that it crosses."""
    for importer, imported in arrows:
        between = range(rows[importer] + 1, rows[imported])
        crossed = [(f"{importer} {imported}", row) for row in between]
        yield [(importer, rows[importer]), *crossed, (imported, rows[imported])]


def imports(arrows: Sequence[tuple[str, str]]) -> Drawing:
    """Who imports whom: (importer, imported) from top to bottom, with few crossings (Sugiyama's layers)."""
    rows = levels(arrows)
    paths = list(ways(arrows, rows))
    places = {place for path in paths for place in path}
    order = {row: sorted(place for place in places if place[1] == row) for row in range(max(rows.values()) + 1)}
    neighbours = [step for path in paths for step in pairwise(path)]
    for sweep in range(24):
        down = sweep % 2 == 0
        for row in sorted(order, reverse=not down):
            above = {place: index for index, place in enumerate(order.get(row - 1 if down else row + 1, []))}
            centre = {}
            for index, place in enumerate(order[row]):
                seen = [above[one] for step in neighbours for one in step if place in step and one in above]
                centre[place] = sum(seen) / len(seen) if seen else index
            order[row].sort(key=lambda place: centre[place])
    widths = {place: 118 if place[0] in rows else 24 for place in places}
    widest = max(sum(map(widths.__getitem__, row)) for row in order.values())
    drawing = Drawing(widest + 40, 70 * len(order) + 20, "Who imports whom")
    centres = {}
    for row, ordered in order.items():
        x = 20 + (widest - sum(map(widths.__getitem__, ordered))) / 2
        for place in ordered:
            centres[place] = (x + widths[place] / 2, 20 + 70 * row)
            x += widths[place]
    for path in paths:
        commands = ""
        for start, end in pairwise(path):
            (x, top), (to, bottom) = centres[start], centres[end]
            top, bottom = top + (30 if start[0] in rows else 15), bottom + (0 if end[0] in rows else 15)
            bend = (top + bottom) / 2
            commands += f"{'' if commands else f'M{x:g} {top:g}'}C{x:g} {bend:g} {to:g} {bend:g} {to:g} {bottom:g}"
        drawing.path(commands, "arrow")
    for place, (x, y) in centres.items():
        if place[0] in rows:
            drawing.box(x - 52, y, 104, 30, "query", place[0])
    return drawing


DRAWINGS = {
    "pass.svg": one_pass,
    "row.svg": packed_row,
    "compression.svg": compression,
    "cascade.svg": cascade,
    "query.svg": shared_query,
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (FIGURES / name).write_text(str(draw()), encoding="utf-8")
