import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from flagembedding_matryoshka.evaluation.candidates import Candidates, Halves
from flagembedding_matryoshka.evaluation.fusion import choose_weights
from flagembedding_matryoshka.evaluation.runs import first_stage_run, fuse_runs
from flagembedding_matryoshka.inference.fusion import fuse
from flagembedding_matryoshka.text.collections import Collection

WEIGHTS = (0.0, 0.3, 1.0, 3.0)


@pytest.fixture
def lists():
    """24 queries with 6 candidates, one of them relevant; the first stage scores it a little higher."""
    draw = np.random.default_rng(0)
    queries, passages = [f"q{number}" for number in range(24)], [f"p{number}" for number in range(6)]
    found = {query: draw.permutation(passages).tolist() for query in queries}
    relevant = {query: {found[query][draw.integers(6)]: 1} for query in queries}
    first_stage = {
        query: [float(draw.normal(1.0 if passage in relevant[query] else 0.0)) for passage in found[query]]
        for query in queries
    }
    collection = Collection(dict.fromkeys(passages, ""), dict.fromkeys(queries, ""), relevant)
    return Candidates(collection, found, "mine", first_stage)


@pytest.fixture
def run(lists):
    draw = np.random.default_rng(1)
    relevant = lists.collection.relevant
    return {
        query: {passage: float(draw.normal(1.5 if passage in relevant[query] else 0.0)) for passage in passages}
        for query, passages in lists.passages.items()
    }


def ndcg(scores, relevant):
    """nDCG@10 of a query with one relevant passage, among fewer than ten."""
    order = sorted(scores, key=scores.get, reverse=True)
    return 1 / math.log2(2 + order.index(relevant))


def by_hand(lists, runs, weights, query):
    """nDCG@10 of a query by the sum of weighted standard scores."""
    total = np.zeros(len(lists.passages[query]))
    for run, weight in zip(runs, weights, strict=True):
        values = np.array([run[query][passage] for passage in lists.passages[query]])
        total += weight * (values - values.mean()) / values.std()
    (relevant,) = lists.collection.relevant[query]
    return ndcg(dict(zip(lists.passages[query], total, strict=True)), relevant)


def halves_by_name(lists):
    queries, halves = list(lists.passages), Halves.of(lists.passages)
    return [queries[place] for place in halves.choosing], [queries[place] for place in halves.held_out]


def test_a_fused_run_is_what_the_re_ranker_fuses(lists, run):
    fused = fuse_runs(lists, run, [(first_stage_run(lists), 0.7)])
    for query, passages in lists.passages.items():
        expected = fuse(torch.tensor(list(run[query].values())), torch.tensor(lists.first_stage[query]), 0.7)
        assert list(fused[query]) == passages
        assert list(fused[query].values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_best_weight_of_the_choosing_half_is_chosen(lists, run):
    choosing, _ = halves_by_name(lists)
    scorers = (run, first_stage_run(lists))
    expected = {
        weight: np.mean([by_hand(lists, scorers, (1, weight), query) for query in choosing]) for weight in WEIGHTS
    }
    choice = choose_weights(lists, run, scorers[1:], WEIGHTS, Halves.of(lists.passages))
    assert {weight: quality for (weight,), quality in choice.qualities.items()} == pytest.approx(expected)
    assert choice.weights == (max(expected, key=expected.get),)
    assert len(set(expected.values())) > 1 and choice.weights[0] not in (WEIGHTS[0], WEIGHTS[-1])


def test_several_scorers_have_a_weight_each(lists, run):
    choosing, _ = halves_by_name(lists)
    other = {query: {passage: -(score**3) for passage, score in scores.items()} for query, scores in run.items()}
    scorers = (run, first_stage_run(lists), other)
    choice = choose_weights(lists, run, scorers[1:], WEIGHTS, Halves.of(lists.passages))
    assert len(choice.qualities) == len(WEIGHTS) ** 2
    for weights, quality in choice.qualities.items():
        assert quality == pytest.approx(np.mean([by_hand(lists, scorers, (1, *weights), query) for query in choosing]))
    assert choice.qualities[choice.weights] == max(choice.qualities.values())


def test_the_other_half_is_not_read(lists, run):
    halves = Halves.of(lists.passages)
    choosing, held_out = halves_by_name(lists)
    choice = choose_weights(lists, run, [first_stage_run(lists)], WEIGHTS, halves)
    passages = lists.passages
    relevant = lists.collection.relevant | {query: {passages[query][0]: 3} for query in held_out}
    changed = replace(lists, collection=replace(lists.collection, relevant=relevant))
    half = {query: run[query] for query in choosing}
    first_stage = {query: first_stage_run(lists)[query] for query in choosing}
    assert choose_weights(changed, half, [first_stage], WEIGHTS, halves) == choice


def test_of_equally_good_weights_the_smallest_is_chosen(lists, run):
    constant = {query: dict.fromkeys(scores, 1.0) for query, scores in run.items()}
    choice = choose_weights(lists, run, [constant], (2.0, 0.5, 1.0, 0.5), Halves.of(lists.passages))
    assert choice.weights == (0.5,) and list(choice.qualities) == [(0.5,), (1.0,), (2.0,)]


def test_a_query_without_candidates_stays_without(lists, run):
    empty = replace(lists, passages=lists.passages | {"q0": []}, first_stage=lists.first_stage | {"q0": []})
    fused = fuse_runs(empty, {query: run[query] for query in run if query != "q0"}, [(first_stage_run(empty), 1.0)])
    assert fused["q0"] == {} and len(fused) == len(run)


@pytest.mark.parametrize(
    ("first_stage", "message"),
    [
        (lambda passages: None, "mine: --fusion needs the first stage's scores, and these lists have none"),
        (lambda passages: dict.fromkeys(passages, [2.0] * 6), "all candidates of a query have the same one"),
    ],
)
def test_lists_without_scores_are_refused(lists, first_stage, message):
    with pytest.raises(ValueError, match=message):
        first_stage_run(replace(lists, first_stage=first_stage(lists.passages)))


def test_a_single_query_with_equal_scores_is_accepted(lists):
    assert first_stage_run(replace(lists, first_stage=lists.first_stage | {"q0": [1.0] * 6}))["q0"]["p0"] == 1.0
