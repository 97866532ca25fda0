import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from flagembedding_matryoshka.evaluation.candidates import Halves
from flagembedding_matryoshka.evaluation.comparison import choose_settings, pareto_front, plan_settings
from flagembedding_matryoshka.evaluation.results import Result
from flagembedding_matryoshka.inference.calibration import Platt
from flagembedding_matryoshka.inference.plan import Plan
from flagembedding_matryoshka.setting import Setting

FULL, HALF, POOR = Setting(6), Setting(3), Setting(2)
HALVES = Halves((0, 2), (1, 3))


def result(setting, flops, values):
    return Result(setting, flops, 100.0, None, {"nDCG@10": list(values)})


RESULTS = [
    result(POOR, 4.0, [0.1, 0.9, 0.1, 0.9]),
    result(HALF, 4.0, [0.9, 0.2, 0.9, 0.3]),
    result(FULL, 8.0, [0.5, 0.4, 1.0, 0.6]),
]


def test_a_plan_has_the_shares_of_both_halves_apart():
    poor, half, full = plan_settings(RESULTS, FULL, HALVES, {HALF: Platt(1.0, 0.0)})
    assert (half.ndcg_share, half.held_out_ndcg_share) == (pytest.approx(1.8 / 1.5), pytest.approx(0.5))
    assert (poor.ndcg_share, poor.held_out_ndcg_share) == (pytest.approx(0.2 / 1.5), pytest.approx(1.8))
    assert (full.flops_share, full.ndcg_share, full.held_out_ndcg_share) == (1.0, 1.0, 1.0)
    assert [item.calibration for item in (poor, half, full)] == [None, Platt(1.0, 0.0), None]
    plan = Plan((2, 3, 6), (), "d", 2, "x", (poor, half, full))
    assert plan.choose(budget=0.5) == HALF  # which the other half would not


def test_what_one_half_chooses_is_reported_on_the_other():
    (chosen,) = choose_settings(RESULTS, FULL, HALVES)
    assert (chosen.setting, chosen.flops_share) == (HALF, 0.5)
    assert (chosen.ndcg_share, chosen.held_out_share) == (pytest.approx(1.2), pytest.approx(0.5))
    assert chosen.change == pytest.approx(-0.25)
    low, high = chosen.interval
    assert low <= chosen.change <= high and 0 < chosen.p_value <= 1


def test_the_best_of_many_that_are_equal_flatters_itself_where_it_is_chosen():
    draw = np.random.default_rng(0)
    values = np.clip(draw.normal(0.5, 0.2, (30, 200)), 0, 1)
    results = [result(Setting(depth + 1), 1.0 + depth / 100, row) for depth, row in enumerate(values)]
    halves = Halves(tuple(range(100)), tuple(range(100, 200)))
    best = max(choose_settings(results, Setting(1), halves), key=lambda item: item.ndcg_share)
    assert best.ndcg_share > 1.03 > best.held_out_share


def test_a_front_is_told_from_the_cheapest_on_and_the_full_network_has_no_change():
    chosen = choose_settings([RESULTS[2], result(HALF, 4.0, [0.4, 0.3, 0.4, 0.3])], FULL, HALVES)
    assert [item.setting for item in chosen] == [HALF, FULL]
    assert (chosen[1].change, chosen[1].interval, chosen[1].p_value) == (0.0, None, None)


def test_a_full_network_that_finds_nothing_in_a_half_is_refused():
    nothing = [result(FULL, 8.0, [0.5, 0.0, 0.5, 0.0])]
    with pytest.raises(ValueError, match="nDCG@10 is 0 on the 2 held-out queries"):
        plan_settings(nothing, FULL, HALVES)


points = st.lists(st.tuples(st.integers(1, 6).map(float), st.integers(-3, 3).map(float)), min_size=1, max_size=20)


def dominates(one, other):
    return one[0] <= other[0] and one[1] >= other[1] and one != other


@given(points)
def test_equals_asking_every_pair(points):
    assert pareto_front(points) == [not any(dominates(other, point) for other in points) for point in points]


def test_equal_points_are_on_it_together():
    assert pareto_front([(1.0, 0.5), (1.0, 0.5), (2.0, 0.5), (0.5, 0.1)]) == [True, True, False, True]
