"""Fusion of scores with those of the first stage."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flagembedding_matryoshka.inference.fusion import (
    as_first_stage,
    as_weight,
    best_first,
    fuse,
    reciprocal_ranks,
    standard_scores,
)

numbers = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20)


def test_fused_scores_are_the_formula():
    fused = fuse(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 5.0, 8.0]), 0.5)
    z, first = math.sqrt(1.5), [-math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2)]
    assert fused.tolist() == pytest.approx([-z + 0.5 * first[0], 0.5 * first[1], z + 0.5 * first[2]])


@given(numbers, st.floats(0.125, 8), st.floats(-50, 50))
def test_standard_scores_do_not_depend_on_scale_and_offset(values, scale, offset):
    given_ = torch.tensor(values, dtype=torch.float64)
    if given_.std() > 1e-3:
        moved = standard_scores(given_ * scale + offset)
        assert torch.allclose(moved, standard_scores(given_), atol=1e-6)
        assert moved.std(correction=0).item() == pytest.approx(1)


def test_equal_scores_of_one_side_leave_the_order_to_the_other():
    values = torch.tensor([0.1, 0.3, 0.2])
    assert fuse(values, torch.full((3,), 0.1), 9.0).argsort().tolist() == [0, 2, 1]
    assert fuse(torch.full((3,), 0.1), values, 0.5).argsort().tolist() == [0, 2, 1]
    assert standard_scores(torch.tensor([])).tolist() == []


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1.0, 1e200, 1.5e308])
def test_standard_scores_of_extreme_scales_are_finite(scale):
    values = torch.tensor([-1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(standard_scores(values * scale), standard_scores(values), atol=1e-3)


def test_the_last_digit_of_a_large_value_causes_no_division_by_zero():
    last = math.nextafter(1.0, 2.0)
    for values in ([last, math.nextafter(last, 2.0)], [1.0, last, last], [-last, -1.0]):
        found = standard_scores(torch.tensor(values, dtype=torch.float64)).tolist()
        assert found == sorted(found) and found[0] < -0.5 and found[-1] > 0.5


def test_equal_fused_scores_leave_the_order_to_the_scores_and_then_to_the_places():
    fused = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert best_first(fused, torch.tensor([1e-40, 3.0, 2e-40, 3.0, 1e-40])).tolist() == [1, 3, 2, 0, 4]


def test_a_missing_candidate_gets_the_lowest_score():
    assert as_first_stage(0, [3, None, 1.5], 3) == [3.0, 1.5, 1.5]
    assert as_first_stage(0, [None, None], 2) == [0.0, 0.0]


def test_scores_may_be_scalars_of_any_library():
    assert as_first_stage(0, [np.float32(0.5), torch.tensor(2), np.int64(3), torch.tensor(0.5).bfloat16()], 4) == [
        0.5,
        2.0,
        3.0,
        0.5,
    ]


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ([1.0], ValueError, "query 4 has 1 first_stage_scores, but 2 candidates"),
        ([1.0, math.nan], ValueError, "query 4: value 1 is nan, but must be finite, or None for a candidate that"),
        (torch.tensor([1.0, math.inf]), ValueError, "query 4: value 1 is inf"),
        (torch.ones(2, 1), TypeError, r"query 4: value 0 must be a number, or None, got tensor\(\[1"),
        (torch.tensor([True, False]), TypeError, "query 4: value 0 must be a number, or None, got True"),
        ([math.inf, 1.0], ValueError, "query 4: value 0 is inf"),
        ([1.0, "2"], TypeError, "query 4: value 1 must be a number, or None, got '2'"),
        ([True, 1.0], TypeError, "query 4: value 0 must be a number, or None, got True"),
    ],
)
def test_wrong_first_stage_scores_are_named(values, error, said):
    with pytest.raises(error, match=said):
        as_first_stage(4, values, 2)


@pytest.mark.parametrize(("weight", "error"), [(-0.1, ValueError), (math.nan, ValueError), ("0.5", TypeError)])
def test_wrong_weights_are_refused(weight, error):
    with pytest.raises(error, match="fusion"):
        as_weight(weight)


def test_reciprocal_ranks_fall():
    assert reciprocal_ranks(3) == [1 / 61, 1 / 62, 1 / 63]


def test_rounding_errors_of_equal_documents_do_not_overrule_the_first_stage():
    scores = torch.tensor([3.0, 3.0000002, 2.9999998])
    assert fuse(scores, torch.tensor([1.0, 2.0, 3.0]), 0.1).argsort(descending=True).tolist() == [2, 1, 0]
    assert fuse(scores * torch.tensor([1.0, 1.001, 1.0]), torch.tensor([1.0, 2.0, 3.0]), 0.1).argmax() == 1
    timestamps = torch.tensor([1.7e9, 1.7e9 + 1, 1.7e9 + 2], dtype=torch.float64)
    assert fuse(scores, timestamps, 0.1).argsort(descending=True).tolist() == [2, 1, 0]
