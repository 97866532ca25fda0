"""Figures that docs/drawings.py draws, and the picture of docs/imports.md."""

import re
import runpy
from itertools import combinations
from xml.etree import ElementTree

import pytest

from tests.pages import PAGES, ROOT

DRAWN = runpy.run_path(str(ROOT / "docs" / "drawings.py"))
FIGURES = ROOT / "docs" / "figures"
SVG = "{http://www.w3.org/2000/svg}"
ARROWS = re.findall(r"(\w+) --> (\w+)", PAGES["docs/imports.md"])


def test_every_figure_is_what_the_script_draws():
    assert {path.name for path in FIGURES.iterdir()} == set(DRAWN["DRAWINGS"])
    for name, draw in DRAWN["DRAWINGS"].items():
        assert (FIGURES / name).read_text(encoding="utf-8") == str(draw()), "run python docs/drawings.py"
        assert any(f"figures/{name})" in text for text in PAGES.values()), f"{name} is on no page"


@pytest.mark.parametrize("drawing", [*(draw() for draw in DRAWN["DRAWINGS"].values()), DRAWN["imports"](ARROWS)])
def test_a_figure_has_colours_of_both_schemes_and_nothing_outside(drawing):
    root = ElementTree.fromstring(str(drawing))
    width, height = map(float, root.get("viewBox").split()[2:])
    assert "prefers-color-scheme: dark" in root.find(f"{SVG}style").text
    for box in root.iter(f"{SVG}rect"):
        if box.get("class") != "paper":
            x, y, wide, high = (float(box.get(name)) for name in ("x", "y", "width", "height"))
            assert 0 <= x <= x + wide <= width and 0 <= y <= y + high <= height
    for text in root.iter(f"{SVG}text"):
        x, reach = float(text.get("x")), 0.46 * len(text.text) * float(text.get("font-size", 15))
        left = x - reach * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
        assert left >= 0 and left + reach <= width, text.text


def test_the_picture_of_imports_has_every_package_and_all_arrows_point_down():
    root = ElementTree.fromstring(str(DRAWN["imports"](ARROWS)))
    boxes = [
        tuple(float(box.get(name)) for name in ("x", "y", "width", "height"))
        for box in root.iter(f"{SVG}rect")
        if box.get("class") != "paper"
    ]
    centres = {text.text: float(text.get("y")) for text in root.iter(f"{SVG}text")}
    assert set(centres) == {name for arrow in ARROWS for name in arrow}
    assert len([path for path in root.iter(f"{SVG}path") if path.get("class") == "arrow"]) == len(ARROWS)
    assert all(centres[importer] < centres[imported] for importer, imported in ARROWS)
    for (x, y, wide, high), (other_x, other_y, other_wide, other_high) in combinations(boxes, 2):
        assert x + wide <= other_x or other_x + other_wide <= x or y + high <= other_y or other_y + other_high <= y
