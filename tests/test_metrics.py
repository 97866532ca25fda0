import math

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, nDCG

from flagembedding_matryoshka.metrics import ndcg, rank_grades, recall, reciprocal_rank


@pytest.mark.parametrize("highest", [1, 3])
def test_measures_equal_those_of_ir_measures(highest):
    draw = np.random.default_rng(0)
    lists, longest = 200, 25
    lengths = draw.integers(1, longest + 1, lists)
    is_padding = np.arange(longest) >= lengths[:, None]
    scores, grades = draw.normal(size=(lists, longest)), draw.integers(-1, highest + 1, (lists, longest))
    grades[draw.random((lists, longest)) < 0.7] = 0
    places = [(query, place) for query, place in np.argwhere(~is_padding).tolist()]
    qrels = [ir_measures.Qrel(str(query), str(place), int(grades[query, place])) for query, place in places]
    run = [ir_measures.ScoredDoc(str(query), str(place), scores[query, place]) for query, place in places]
    ranked = rank_grades(scores, grades, is_padding)
    for k in (1, 5, 10):
        measures = {RR @ k: reciprocal_rank(ranked, k), nDCG @ k: ndcg(ranked, k), R @ k: recall(ranked, k)}
        values = {(item.measure, item.query_id): item.value for item in ir_measures.iter_calc(measures, qrels, run)}
        for measure, found in measures.items():
            expected = [values.get((measure, str(query)), 0.0) for query in range(lists)]
            assert found == pytest.approx(expected, abs=1e-12)
            assert len(set(found.round(6))) > (1 if k == 1 else 4)


def test_among_equal_scores_the_lowest_grade_ranks_first():
    scores = [[2.0, 1.0, 1.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0]]
    grades = [[0, 2, 0, 1, 3], [1, 0, 0, 0, 0]]
    ranked = rank_grades(scores, grades)
    assert ranked.tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 0, 1]]
    assert reciprocal_rank(ranked, 10).tolist() == [1 / 3, 1 / 5]
    assert reciprocal_rank(ranked, 2).tolist() == [0, 0]
    dcg, ideal = 1 / 2 + 2 / math.log2(5) + 3 / math.log2(6), 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg(ranked, 10) == pytest.approx([dcg / ideal, 1 / math.log2(6)])


def test_the_ideal_ranking_may_have_passages_that_are_not_in_the_list():
    assert ndcg([0, 1], 10, judged=[1, 0, 1]) == pytest.approx(1 / math.log2(3) / (1 + 1 / math.log2(3)))
    assert ndcg([0, 0], 10, judged=[0, 1]) == ndcg([0, 0], 10) == ndcg([-1, -2], 10) == 0


def test_padding_comes_last_and_infinite_scores_are_ordered():
    scores = [[-np.inf, np.nan, np.inf, 0.0]]
    assert rank_grades(scores, [[1, 9, 2, 3]], [[False, True, False, False]]).tolist() == [[2, 3, 1, 0]]
    with pytest.raises(ValueError, match=r"the score at \(0, 1\) is NaN"):
        rank_grades(scores, [[1, 9, 2, 3]])


def test_an_empty_list_has_the_value_0():
    assert ndcg([], 10, judged=[1]) == reciprocal_rank([], 10) == recall([], 10, judged=[1]) == 0


def test_recall_counts_all_judged_passages():
    assert recall([0, 2, 0, 1], 2, judged=[1, 2, 1, 0]) == pytest.approx(1 / 3)
    assert recall([[1, 0], [0, 0]], 1).tolist() == [1.0, 0.0]
