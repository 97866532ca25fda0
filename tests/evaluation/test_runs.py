import math

import hypothesis.strategies as st
import ir_measures
import pytest
from hypothesis import given
from ir_measures import R, nDCG

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.runs import in_order, per_query, to_trec
from flagembedding_matryoshka.text.collections import Collection

PASSAGES = [f"p{number}" for number in range(15)]
graded = st.dictionaries(st.sampled_from(PASSAGES), st.integers(1, 3), min_size=1, max_size=14)
scored = st.dictionaries(st.sampled_from(PASSAGES), st.sampled_from([-1.5, 0.0, 0.25, 2.0, 7.0]), min_size=1)


def slow(relevant, scores, recall_at):
    """The measures by definition, on trec_eval's ranking: by score, then by id, both highest first."""
    ranking = sorted(scores, key=lambda passage: (scores[passage], passage), reverse=True)
    gains = [relevant.get(passage, 0) for passage in ranking]
    ideal = sorted(relevant.values(), reverse=True)

    def dcg(values):
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(values[:10], start=1))

    first = next((rank for rank, gain in enumerate(gains[:10], start=1) if gain), None)
    found = sum(gain > 0 for gain in gains[:recall_at])
    return dcg(gains) / dcg(ideal), 0.0 if first is None else 1 / first, found / len(relevant)


def candidates_of(relevant, scores):
    collection = Collection(dict.fromkeys(PASSAGES, "text"), dict.fromkeys(relevant, "text"), relevant)
    return Candidates(collection, {query: list(scores.get(query, ())) for query in relevant}, "mine")


@given(graded, graded, scored, scored, st.integers(1, 12))
def test_measures_are_their_definitions(first, second, first_scores, second_scores, recall_at):
    relevant, run = {"a": first, "b": second}, {"b": second_scores, "a": first_scores}
    measured = per_query(candidates_of(relevant, run), run, recall_at)
    assert list(measured) == ["nDCG@10", "MRR@10", f"Recall@{recall_at}"]
    for place, query in enumerate("ab"):
        values = [values[place] for values in measured.values()]
        assert values == pytest.approx(slow(relevant[query], run[query], recall_at))


def test_a_query_without_candidates_counts_with_nothing():
    run = {"a": {"p1": 1.0}}
    measured = per_query(candidates_of({"b": {"p1": 1}, "a": {"p1": 1}}, run), run, 5)
    assert measured == {"nDCG@10": [0.0, 1.0], "MRR@10": [0.0, 1.0], "Recall@5": [0.0, 1.0]}


def test_a_ranking_becomes_falling_scores():
    assert in_order({"a": ["p3", "p1"], "b": []}) == {"a": {"p3": -1.0, "p1": -2.0}, "b": {}}


@given(graded, scored)
def test_the_file_measures_as_the_run_and_lists_the_best_first(relevant, scores):
    text = to_trec({"a": scores}, "layer6")
    qrels = [ir_measures.Qrel("a", passage, grade) for passage, grade in relevant.items()]
    found = ir_measures.calc_aggregate([nDCG @ 10, R @ 4], qrels, ir_measures.read_trec_run(text))
    expected = per_query(candidates_of({"a": relevant}, {"a": scores}), {"a": scores}, 4)
    assert found[nDCG @ 10] == pytest.approx(expected["nDCG@10"][0])
    assert found[R @ 4] == pytest.approx(expected["Recall@4"][0])
    rows = [line.split() for line in text.splitlines()]
    assert [int(row[3]) for row in rows] == list(range(1, len(scores) + 1))
    assert [row[2] for row in rows] == sorted(scores, key=lambda passage: (scores[passage], passage), reverse=True)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_survives_the_file(score):
    assert float(to_trec({"a": {"p": score}}, "t").split()[4]) == pytest.approx(score, rel=1e-8)
