"""How well runs rank, query by query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ir_measures
from ir_measures import RR, Measure, R, nDCG

from flagembedding_matryoshka.evaluation.candidates import Candidates

Run = dict[str, dict[str, float]]
"""Query id to {passage id: score}, higher is better."""

QUALITY = "nDCG@10"
"""The measure that settings are compared and chosen by."""


def per_query(candidates: Candidates, run: Run, recall_at: int) -> dict[str, list[float]]:
    """nDCG@10, MRR@10 and recall of each query, in the order of the candidates.

    Judgements are the collection's, whether or not a passage is a candidate. Ties are broken by passage id, the highest
    first, as trec_eval does, and not by the candidates' order, which would lend its quality to a model without any.
    ir-measures' providers break them in opposite ways, so what they are given is ranks.
    """
    return _per_query(
        candidates,
        run,
        {QUALITY: nDCG @ 10, "MRR@10": RR @ 10, f"Recall@{recall_at}": R @ recall_at},
        list(candidates.passages),
    )


def quality_of(candidates: Candidates, run: Run, queries: Sequence[str]) -> list[float]:
    """Return nDCG@10 of each of `queries`, as `per_query`. Judgements of other queries are not read."""
    return _per_query(candidates, run, {QUALITY: nDCG @ 10}, queries)[QUALITY]


def _per_query(
    candidates: Candidates, run: Run, measures: Mapping[str, Measure], queries: Sequence[str]
) -> dict[str, list[float]]:
    qrels = [
        ir_measures.Qrel(query, passage, grade)
        for query in queries
        for passage, grade in candidates.collection.relevant[query].items()
    ]
    found = [
        ir_measures.ScoredDoc(query, passage, -float(rank))
        for query in queries
        for rank, passage in enumerate(ranking(run.get(query, {})))
    ]
    values = {
        (item.measure, item.query_id): item.value for item in ir_measures.iter_calc(measures.values(), qrels, found)
    }
    return {name: [float(values.get((measure, query), 0.0)) for query in queries] for name, measure in measures.items()}


def ranking(scores: Mapping[str, float]) -> list[str]:
    """Passage ids, the best first; of equal scores the highest id first."""
    return sorted(scores, key=lambda passage: (scores[passage], passage), reverse=True)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def in_order(rankings: Mapping[str, Sequence[str]]) -> Run:
    """Passages ranked without comparable scores, as scores: -1 for the first, -2 for the second, …"""
    return {query: {passage: -float(rank) for rank, passage in enumerate(ids, 1)} for query, ids in rankings.items()}


def to_trec(run: Run, tag: str) -> str:
    """A run in TREC's format, the best first. Nine digits hold a float32 exactly."""
    return "".join(
        f"{query} Q0 {passage} {rank} {scores[passage]:.9g} {tag}\n"
        for query, scores in run.items()
        for rank, passage in enumerate(ranking(scores), start=1)
    )


def from_trec(text: str) -> Run:
    """The run that `to_trec` wrote as `text`."""
    run: Run = {}
    for line in text.splitlines():
        query, _, passage, _, score, _ = line.split()
        run.setdefault(query, {})[passage] = float(score)
    return run
