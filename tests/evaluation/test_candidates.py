import logging

import hypothesis.strategies as st
import pytest
from hypothesis import given

from flagembedding_matryoshka.evaluation.candidates import (
    Candidates,
    Halves,
    chooses,
    from_bm25,
    from_run,
    sample_queries,
    take,
)
from flagembedding_matryoshka.mining.bm25 import BM25
from flagembedding_matryoshka.text.collections import Collection, read_collection
from tests.collection import CORPUS, QUERIES

LINES = ["q1 Q0 p3 1 9.5 bm25", "q3 Q0 p4 1 2 bm25", "", "q1 Q0 p1 2 11 bm25", "q2 Q0 p7 1 -1e3 bm25"]


@pytest.fixture
def run(tmp_path):
    def write(lines):
        path = tmp_path / "bm25.trec"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_bm25_gives_its_first(candidates):
    assert candidates.passages["q1"][0] == "p0" and len(candidates.passages["q1"]) == 6
    assert set(candidates.passages["q3"]) == {"p4", "p5", "p6", "p7"}
    assert list(candidates.passages) == ["q1", "q3", "q2"] and len(candidates) == 10
    assert candidates.source == "BM25's first 6"


def test_the_scores_of_bm25_stay_with_its_candidates(beir):
    read = read_collection(beir, "test")
    found, scores = from_bm25(read, 3), BM25(list(read.passages.values())).scores
    for query, passages in found.passages.items():
        expected = dict(zip(read.passages, scores(read.queries[query]).tolist(), strict=True))
        assert found.first_stage[query] == pytest.approx([expected[passage] for passage in passages])
        assert found.first_stage[query] == sorted(found.first_stage[query], reverse=True)
    assert len(found.first_stage["q1"]) == 3 and found.first_stage["q2"] == []


def test_the_scores_of_a_run_stay_with_its_candidates(beir, run):
    candidates = from_run(read_collection(beir, "test"), run(LINES), top_k=2)
    assert candidates.first_stage == {"q1": [11.0, 9.5], "q3": [2.0], "q2": [-1000.0]}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"q": [1.0]}, "query 0 has 1 first_stage_scores, but 2 candidates"),
        ({}, "query 0 has 0 first_stage_scores, but 2 candidates"),
        ({"q": [1.0, float("nan")]}, "value 1 is nan, but must be finite"),
    ],
)
def test_all_candidates_or_none_need_first_stage_scores(scores, message):
    collection = Collection({"a": "x", "b": "y"}, {"q": "x"}, {"q": {"a": 1}})
    with pytest.raises(ValueError, match=message):
        Candidates(collection, {"q": ["a", "b"]}, "mine", scores)
    assert Candidates(collection, {"q": ["a", "b"]}, "mine").first_stage is None


def test_a_query_that_bm25_misses_has_no_candidates_and_is_named(beir, caplog):
    assert from_bm25(read_collection(beir, "test"), 3).passages["q2"] == []
    assert "BM25 finds nothing for 1 queries, whose measures are 0, such as 'q2'" in caplog.text


def test_a_query_that_is_a_passage_is_no_candidate_of_its_own(collection, run):
    corpus = [*CORPUS, {"_id": "q1", "title": "", "text": "wing"}, {"_id": "q3", "text": "heat of another kind"}]
    read = read_collection(collection(corpus=corpus, judgements=[("q1", "p2", 1), ("q3", "p4", 1)]), "train")
    found = from_bm25(read, 3)
    assert "q1" not in found.passages["q1"] and len(found.passages["q1"]) == 3
    assert "q3" in found.passages["q3"]  # the same id by chance
    lines = [f"{query} Q0 {passage} 1 {score} x" for query in ("q1", "q3") for passage, score in (("q1", 3), ("q3", 2))]
    found = from_run(read, run(lines), 3)
    assert found.passages == {"q1": ["q3"], "q3": ["q1", "q3"]} and found.first_stage == {"q1": [2.0], "q3": [3.0, 2.0]}


def test_a_run_is_ordered_by_score(beir, run):
    candidates = from_run(read_collection(beir, "test"), run(LINES), top_k=2)
    assert candidates.passages == {"q1": ["p1", "p3"], "q3": ["p4"], "q2": ["p7"]}
    assert candidates.source == "the first 2 of bm25.trec"
    assert from_run(read_collection(beir, "test"), run(LINES), top_k=1).passages["q1"] == ["p1"]
    assert candidates.pairs(["q3", "q1"])[:2] == [
        ("the heat", "wing lift drag flow heat"),
        ("wing", "wing lift"),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [*LINES, "q1 Q0 p2 3 1.0"],
            r"bm25.trec, line 6: must be query, Q0, passage, .* got \['q1', 'Q0', 'p2', '3', '1.0'\]",
        ),
        ([*LINES, "q1 Q0 p2 3 high bm25"], r"bm25.trec, line 6: .* a finite score .*'high'"),
        ([*LINES, "q1 Q0 p2 3 nan bm25"], r"bm25.trec, line 6: .* a finite score .*'nan'"),
        ([*LINES, "q1 Q0 p99 3 1 bm25"], r"bm25.trec, line 6: the collection has no passage 'p99'"),
        ([*LINES, "q9 Q0 p1 3 1 bm25"], r"bm25.trec, line 6: the collection has no query 'q9'"),
        ([*LINES, "q1 Q0 p1 3 1 bm25"], r"bm25.trec, line 6: query 'q1' has the passage 'p1' twice"),
        (LINES[:1], r"bm25.trec has no candidates for 2 judged queries, such as 'q3'"),
    ],
)
def test_what_is_wrong_in_a_run_is_named_with_file_and_line(beir, run, lines, message):
    with pytest.raises(ValueError, match=message):
        from_run(read_collection(beir, "test"), run(lines), 10)


def test_some_queries_are_drawn_by_seed(beir):
    collection = read_collection(beir, "test")
    drawn = {tuple(sample_queries(collection, 2, seed).relevant) for seed in range(20)}
    assert drawn == {("q1", "q3"), ("q1", "q2"), ("q3", "q2")}
    assert sample_queries(collection, 2, 7) == sample_queries(collection, 2, 7)
    assert sample_queries(collection, 3, 7) is sample_queries(collection, None, 7) is collection
    assert len(from_bm25(sample_queries(collection, 2, 7), 6).passages) == 2


def test_without_any_candidate_nothing_is_ranked(collection):
    with pytest.raises(ValueError, match="BM25's first 5: no query has a candidate"):
        from_bm25(read_collection(collection(judgements=[("q2", "p1", 1)]), "train"), 5)


def test_an_id_that_a_run_cannot_name_is_refused():
    with pytest.raises(ValueError, match="the id 'a b' has white space"):
        Candidates(Collection({"a b": "x"}, {"q": "x"}, {"q": {"a b": 1}}), {"q": ["a b"]}, "mine")


def test_batches_hold_every_query_once_and_no_more_lists_than_needed(candidates):
    assert list(candidates.batches(["q1", "q3", "q2"], 6)) == [["q1"], ["q3", "q2"]]
    assert list(candidates.batches(["q1", "q2", "q3"], 7)) == [["q1", "q2", "q3"]]
    assert list(candidates.batches(["q2"], 7)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"corpus": [*CORPUS[:7], {**CORPUS[7], "text": CORPUS[7]["text"] + "."}]},
        {"queries": [*QUERIES[:2], {"_id": "q3", "text": "heat"}]},
        {"queries": [*QUERIES[:2], {**QUERIES[2], "instruction": "judge by the topic"}]},
        {"judgements": [("q1", "p2", 1), ("q1", "p5", 1), ("q3", "p6", 1), ("q2", "p1", 1)]},
    ],
)
def test_the_fingerprint_is_of_all_that_results_depend_on(candidates, beir, collection, change):
    same = from_bm25(read_collection(beir, "test"), top_k=6)
    assert same.fingerprint() == candidates.fingerprint()
    judgements = [("q1", "p2", 1), ("q1", "p5", 2), ("q3", "p6", 1), ("q2", "p1", 1)]
    changed = read_collection(collection(split="test", **{"judgements": judgements} | change), "test")
    assert from_bm25(changed, 6).fingerprint() != candidates.fingerprint()
    assert from_bm25(read_collection(beir, "test"), 5).fingerprint() != candidates.fingerprint()


ids = st.lists(st.integers(0, 9999).map(str), unique=True, max_size=40)


@given(ids)
def test_every_query_is_in_one_half(queries):
    halves = Halves.of(queries)
    assert sorted(halves.choosing + halves.held_out) == list(range(len(queries)))
    assert all(chooses(query) for query in take(queries, halves.choosing))
    assert not any(chooses(query) for query in take(queries, halves.held_out))


@given(ids, st.data())
def test_a_query_stays_in_its_half_whatever_is_sampled_with_it(queries, data):
    some = data.draw(st.lists(st.sampled_from(queries), unique=True)) if queries else []
    assert set(take(some, Halves.of(some).choosing)) <= set(take(queries, Halves.of(queries).choosing))


def test_they_are_about_equal():
    assert 460 < len(Halves.of(map(str, range(1000))).choosing) < 540


def test_few_queries_are_warned_of_and_none_are_refused(caplog):
    with caplog.at_level(logging.WARNING):
        Halves(tuple(range(25)), tuple(range(25, 50))).check()
        assert not caplog.records
        Halves((0, 1), (2,)).check()
    assert "2 queries choose and 1 are held out: with fewer than 25" in caplog.text
    for halves in (Halves((0,), ()), Halves((), (0,))):
        with pytest.raises(ValueError, match="by the hashes of their ids: both halves need a query"):
            halves.check()
