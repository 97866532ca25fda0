import demo
import pytest
from docstrings import Candidates

LISTS = [
    Candidates("q", [f"passage {i}" for i in range(20)], 0),
    Candidates("r", [f"passage {i}" for i in range(20)], 3),
]


def test_quality_of_a_known_order():
    bm25, chance = (result for result in reversed(demo.other_orders(LISTS)))
    assert bm25.order == "BM25's order"
    assert bm25.mrr == pytest.approx((1 + 1 / 4) / 2)
    assert 0 <= chance.mrr <= 1
    best = [[float(i == item.positive) for i in range(20)] for item in LISTS]
    assert demo.quality(LISTS, best) == (1.0, 1.0)


def test_a_positive_below_the_tenth_place_counts_nothing():
    worst = [[-float(i == item.positive) for i in range(20)] for item in LISTS]
    assert demo.quality(LISTS, worst) == (0.0, 0.0)


def test_plot_and_table(tmp_path, capsys):
    settings = [
        demo.Result(
            f"{name}, {depth} layers, ratio {ratio}", 0.1 * depth, 0.1 * depth, 100.0, 50.0 * depth, depth, ratio
        )
        for name in ("base", "fine-tuned")
        for ratio in demo.RATIOS
        for depth in (2, 4, 6)
    ]
    results = [*demo.other_orders(LISTS), *settings]
    demo.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    demo.print_table(results)
    assert len(capsys.readouterr().out.strip().splitlines()) == 1 + len(results)
