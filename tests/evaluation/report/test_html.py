import re
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from flagembedding_matryoshka.evaluation.baselines import Baseline, as_given
from flagembedding_matryoshka.evaluation.fusion import Order, WeightChoice, compare_fusion
from flagembedding_matryoshka.evaluation.report.report import Report, first_stages_table
from flagembedding_matryoshka.evaluation.results import Result
from flagembedding_matryoshka.setting import Setting

pytest.importorskip("matplotlib")
from flagembedding_matryoshka.evaluation.report import plot
from flagembedding_matryoshka.evaluation.report.html import page

FULL = Setting(6)
NAME = 'a <b>"bold"</b> encoder & co'
VOID = {"meta", "path", "circle"}


def points_of(text):
    """The attributes of every point, in the order of the arrow keys."""
    return [found for _, found in Elements(text).found if "point" in found.get("class", "").split()]


class Elements(HTMLParser):
    """Every element with its attributes, and whether all are closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def result(setting, flops, speed, *values):
    return Result(setting, flops, speed, None, {"nDCG@10": list(values), "MRR@10": list(values)})


RESULTS = [
    result(Setting(3), 5e8, 200.0, 0.4, 0.2, 0.1),
    result(FULL, 1e9, 100.0, 0.5, 0.5, 0.1),
    result(Setting(6, (2,), 2), 7e8, 90.0, 0.5, 0.4, 0.1),
    result(Setting(6, cascade=((3, 0.5),)), 8e8, 120.0, 0.5, 0.45, 0.1),
]


@pytest.fixture
def baselines(candidates):
    values = {"nDCG@10": [0.1, 0.2, 0.3], "MRR@10": [0.1, 0.2, 0.3]}
    return [Baseline(as_given(candidates, 10).name, values), Baseline(NAME, values, 2e8, 900.0)]


@pytest.fixture
def text(candidates, baselines):
    return page("c & d/test", [Report.of(candidates, RESULTS, baselines, FULL)], None, {})


@pytest.fixture
def fused_report(candidates, baselines):
    """The same with fusion: settings, and a bi-encoder with the first stage."""
    better = {setting: [0.6, 0.7, 0.8] for setting in ("nDCG@10", "MRR@10")}
    fused = [replace(item, per_query=better) for item in RESULTS]
    full = Baseline("6 layers + first stage", better, 1e9, 100.0)
    orders = [
        *(Order(baseline) for baseline in baselines),
        Order(replace(baselines[1], name=f"{NAME} + first stage", per_query=better), [("first stage", 0.5)]),
        Order(full, [("first stage", 0.7)], is_reference=True),
    ]
    choice = WeightChoice((0.7,), {(0.0,): 0.1, (0.7,): 0.2})
    report = compare_fusion(candidates, choice, RESULTS, fused, FULL, baselines[0], orders)
    return Report.of(candidates, RESULTS, baselines, FULL, (), report)


def test_it_is_well_formed_and_asks_for_nothing_of_elsewhere(text):
    elements = Elements(text)
    assert not elements.open
    for name, attributes in elements.found:
        assert name not in ("link", "img", "iframe", "object") and not {"src", "href"} & set(attributes)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|fetch\(", text)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert ids and len(ids) == len(set(ids))


def test_names_are_text_and_no_markup(text):
    assert "<b>" not in text and "c &amp; d/test" in text
    labels = [point["aria-label"] for point in points_of(text) if point["data-row"] == "s0r1"]
    assert len(labels) == 2 and labels[0] == labels[1]
    assert labels[0].startswith(f"{NAME}: nDCG@10 0.2000") and "0.2 GFLOP and 1.111 ms per pair" in labels[0]


def test_points_are_reached_by_the_keyboard_and_belong_to_a_row(text):
    found, points = Elements(text).found, points_of(text)
    rows = [attributes["data-row"] for tag, attributes in found if tag == "tr" and "data-row" in attributes]
    assert len(points) == 2 * 5 and len(rows) == len(set(rows)) == 6
    assert all(point["tabindex"] == "0" and point["data-row"] in rows for point in points)
    assert sum(point["data-row"] == rows[0] for point in points) == 0  # the candidates' own order costs nothing
    assert ("p", {"class": "details", "aria-live": "polite"}) in found
    assert "prefers-color-scheme: dark" in text


def test_fused_points_belong_to_rows_of_their_own(fused_report, text):
    fused_text = page("c", [fused_report], None, {})
    fused = Elements(fused_text)
    assert not fused.open
    points = points_of(fused_text)
    rows = [attributes["data-row"] for tag, attributes in fused.found if tag == "tr" and "data-row" in attributes]
    assert len(rows) == len(set(rows)) and all(point["data-row"] in rows for point in points)
    of_fused = [point for point in points if point["data-row"][:3] in ("s0f", "s0o")]
    assert len(points) == 2 * (5 + 5) and len(of_fused) == 2 * 5
    labels = {point["data-row"]: point["aria-label"] for point in of_fused}
    assert labels["s0f2"].startswith("6 layers, fused: nDCG@10 0.7000; held out ")
    assert labels["s0o2"].startswith(f"{NAME} + first stage: nDCG@10 0.7000; held out ")
    # Each row of the table has the name that its points have.
    cells = re.findall(r'<tr data-row="(s0f\d)"><td>([^<]+)', fused_text)
    named = {row: name for row, name in cells if row != "s0f0"}
    assert len(named) == 4 and all(labels[row].startswith(f"{name}, fused") for row, name in named.items())
    plain = [point["aria-label"] for point in points if point not in of_fused]
    assert plain == [point["aria-label"] for point in points_of(text)]


def test_the_picture_has_fused_points(fused_report, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    monkeypatch.setattr(plot, "replacing", nullcontext)
    for report in (fused_report, replace(fused_report, fusion=None)):
        plot.plot(report, "x", tmp_path)
    fused, plain = ({line.get_label(): line for line in figure.axes[0].get_lines()} for figure in drawn)
    assert set(fused) - set(plain) >= {"fused, full width", "fused, ratio 2 after 2", f"{NAME} + first stage"}
    assert "6 layers + first stage" not in fused  # it is among the settings
    of_exits = fused["fused, full width"]
    assert (list(of_exits.get_xdata()), list(of_exits.get_ydata())) == ([0.5, 1.0], pytest.approx([0.7, 0.7]))


def test_first_stages_beside_each_other_have_their_weights(fused_report):
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in first_stages_table({"a": fused_report, "b": fused_report}).splitlines()
    ]
    assert ["fusion weight", "0.7", "0.7"] in rows and ["6 layers, fused", "0.7000", "0.7000"] in rows
    plain = replace(fused_report, fusion=None)
    assert "fused" not in first_stages_table({"a": plain, "b": plain})


def test_the_script_is_javascript(text, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    script = tmp_path / "script.js"
    script.write_text(re.search(r"<script>(.*)</script>", text, re.DOTALL)[1])
    subprocess.run([node, "--check", str(script)], check=True)


@pytest.mark.slow
def test_a_browser_marks_what_is_pointed_at_and_goes_on_with_the_arrow_keys(text, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium")
    path = tmp_path / "report.html"
    press = """<script>
        const points = document.querySelectorAll("svg .point");
        points[0].focus();
        points[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
    </script></body>"""
    path.write_text(text.replace("</body>", press))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = Elements(dom).found
    labels = [point["aria-label"] for point in points_of(dom)]
    (details,) = re.findall(r'<p class="details"[^>]*>([^<]*)</p>', dom)
    assert details == labels[1] and details.startswith("3 layers: nDCG@10")
    marked = [attributes["data-row"] for _, attributes in found if attributes.get("class", "").endswith("marked")]
    assert len(marked) == 3 and len(set(marked)) == 1  # a point in each chart, and the row


def test_a_point_is_where_its_setting_is_drawn(fused_report):
    places = {}
    for number, panel in enumerate(plot.PANELS):
        axes = plot.Figure().subplots()
        plot._draw(axes, fused_report, panel)
        found = {circle.get_gid(): tuple(circle.get_offsets()[0]) for circle in axes.collections if circle.get_gid()}
        assert list(found.values()) == sorted(found.values()) and len(found) == 10
        places[number] = found
    assert places[0]["r2"] == pytest.approx((0.5, 0.7 / 3)) and places[1]["r2"] == pytest.approx((5, 0.7 / 3))
    assert places[0]["f1"] == pytest.approx((0.5, 0.7)) and places[0]["o2"] == pytest.approx((0.2, 0.7))
    assert places[0]["r1"] == pytest.approx((0.2, 0.2)) and places[1]["r1"] == pytest.approx((1000 / 900, 0.2))
