from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy.stats import ttest_rel

from flagembedding_matryoshka.evaluation.significance import holm, mean_interval, paired_interval, paired_p_value


def test_a_small_case_is_exact():
    values, reference = [0.9, 0.4, 0.8, 0.7, 0.75, 0.2], [0.5, 0.45, 0.3, 0.6, 0.7, 0.1]
    differences = np.subtract(values, reference)
    sums = [abs(np.dot(signs, differences)) for signs in product([1, -1], repeat=6)]
    expected = np.mean([value >= abs(differences.sum()) - 1e-9 for value in sums])
    assert paired_p_value(values, reference) == pytest.approx(expected)
    assert paired_p_value(reference, values) == pytest.approx(expected)


def test_a_large_case_agrees_with_the_t_test_and_repeats():
    draw = np.random.default_rng(0)
    reference = draw.random(200)
    values = reference + draw.normal(0.02, 0.15, 200)
    p_value = paired_p_value(values, reference)
    assert p_value == pytest.approx(ttest_rel(values, reference).pvalue, abs=0.02)
    assert p_value == paired_p_value(values, reference)


def test_equal_settings_do_not_differ():
    assert paired_p_value([0.5, 0.2], [0.5, 0.2]) == 1.0


def test_of_a_single_query_nothing_follows():
    assert paired_p_value([0.5], [0.2]) == 1.0


def test_holm_on_paper():
    # 0.01 × 4, then 0.02 × 3, then 0.03 × 2 = 0.06 which may not fall below 0.06, then 0.5 × 1
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10), st.floats(0.001, 0.999))
def test_holm_rejects_what_stepping_down_rejects(p_values, level):
    rejected = set()
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] * (len(p_values) - rank) > level:
            break
        rejected.add(index)
    assert {index for index, value in enumerate(holm(p_values)) if value <= level} == rejected


def test_an_interval_covers_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(20):
        reference = draw.random(80)
        low, high = paired_interval(reference + draw.normal(0.03, 0.1, 80), reference)
        covered += low <= 0.03 <= high
    assert covered >= 16


def test_an_interval_is_of_the_differences_and_repeats():
    values, reference = [0.9, 0.4, 0.8, 0.7, 0.75], [0.5, 0.45, 0.3, 0.6, 0.7]
    low, high = paired_interval(values, reference)
    assert low < np.mean(np.subtract(values, reference)) < high
    assert (low, high) == paired_interval(values, reference)
    assert paired_interval(reference, values) == pytest.approx((-high, -low), abs=0.02)
    assert paired_interval([0.5, 0.7], [0.25, 0.45]) == pytest.approx((0.25, 0.25))
    assert paired_interval([0.5], [0.25]) is None


def test_the_interval_of_a_mean_is_that_of_differences_from_zero():
    values = [0.9, 0.4, 0.8, 0.7, 0.75]
    low, high = mean_interval(values)
    assert low < np.mean(values) < high and (low, high) == paired_interval(values, [0.0] * 5)
    assert mean_interval([0.5]) is None
