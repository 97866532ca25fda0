"""Runs: scores of candidates, their quality for each query, their fusion, and their files in TREC's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.inference.fusion import ROUNDING, standard_scores
from flagembedding_matryoshka.metrics import ndcg, recall, reciprocal_rank

Run = dict[str, dict[str, float]]
"""Query id to {passage id: score}; a higher score is better."""

QUALITY = "nDCG@10"
"""The measure that settings are compared and chosen by."""
CUTOFF = 10
"""Number of first passages in nDCG and MRR."""


def per_query(candidates: Candidates, run: Run, recall_at: int) -> dict[str, list[float]]:
    """Return nDCG@10, MRR@10 and recall of each query, in the order of the candidates.

    All judgements of the collection count, also those of passages that are no candidates. Equal scores are ordered by
    passage id, the highest first, as in trec_eval. The candidates' own order would credit the first stage's quality to
    a model with equal scores.

    Args:
        candidates: queries and judgements.
        run: the scores. A query that is missing has the value 0.
        recall_at: number of first passages that count in recall.
    """
    measures: dict[str, list[float]] = {QUALITY: [], f"MRR@{CUTOFF}": [], f"Recall@{recall_at}": []}
    for query in candidates.passages:
        ranked, judged = _grades(candidates, run, query)
        values = (ndcg(ranked, CUTOFF, judged), reciprocal_rank(ranked, CUTOFF), recall(ranked, recall_at, judged))
        for found, value in zip(measures.values(), values, strict=True):
            found.append(float(value))
    return measures


def quality_of(candidates: Candidates, run: Run, queries: Sequence[str]) -> list[float]:
    """Return nDCG@10 of each of `queries`, as `per_query`. Judgements of other queries are not read."""
    return [float(ndcg(ranked, CUTOFF, judged)) for ranked, judged in (_grades(candidates, run, q) for q in queries)]


def _grades(candidates: Candidates, run: Run, query: str) -> tuple[list[int], list[int]]:
    """Return the grades of a query's candidates in the order of their ranking, and the grades of its judgements."""
    relevant = candidates.collection.relevant[query]
    return [relevant.get(passage, 0) for passage in ranking(run.get(query, {}))], list(relevant.values())


def ranking(scores: Mapping[str, float]) -> list[str]:
    """Return passage ids, best first. Equal scores are ordered by id, the highest first."""
    return sorted(scores, key=lambda passage: (scores[passage], passage), reverse=True)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def in_order(rankings: Mapping[str, Sequence[str]]) -> Run:
    """Return a run with the scores -1, -2, … for the passages of each ranking."""
    return {query: {passage: -float(rank) for rank, passage in enumerate(ids, 1)} for query, ids in rankings.items()}


def first_stage_run(candidates: Candidates) -> Run:
    """Return the first stage's scores.

    Raises:
        ValueError: if there are no first-stage scores, or all candidates of every query have the same score.
    """
    if candidates.first_stage is None:
        raise ValueError(f"{candidates.source}: --fusion needs the first stage's scores, and these lists have none")
    if all(len(set(scores)) < 2 for scores in candidates.first_stage.values()):
        raise ValueError(
            f"{candidates.source}: --fusion needs the first stage's scores, and all candidates of a query have the "
            "same one. If only an order is known, write reciprocal ranks, 1 / (60 + rank), into the run as scores"
        )
    return {
        query: dict(zip(passages, candidates.first_stage[query], strict=True))
        for query, passages in candidates.passages.items()
    }


def fuse_runs(
    candidates: Candidates, run: Run, others: Sequence[tuple[Run, float]], queries: Sequence[str] | None = None
) -> Run:
    """Add standard scores over the candidates of each query: z(run) + Σ weight · z(other).

    For one other run it equals [`~flagembedding_matryoshka.inference.fusion.fuse`].

    Args:
        candidates: the candidates of each query.
        run: scores with weight 1.
        others: (scores, weight) of each other run.
        queries: the queries of the result; None is all queries.
    """

    def standard(scores: Run, query: str, rounding: float = 0.0) -> torch.Tensor:
        values = [scores[query][passage] for passage in candidates.passages[query]]
        return standard_scores(torch.tensor(values, dtype=torch.float64), rounding)

    fused: Run = {}
    for query in candidates.passages if queries is None else queries:
        values = torch.zeros(0)
        if candidates.passages[query]:
            values = standard(run, query, ROUNDING)
            for other, weight in others:
                values = values + weight * standard(other, query)
        fused[query] = dict(zip(candidates.passages[query], values.tolist(), strict=True))
    return fused


def to_trec(run: Run, tag: str) -> str:
    """Return a run in TREC's format, best first. The nine digits of a score represent a float32 exactly."""
    return "".join(
        f"{query} Q0 {passage} {rank} {scores[passage]:.9g} {tag}\n"
        for query, scores in run.items()
        for rank, passage in enumerate(ranking(scores), start=1)
    )


def from_trec(text: str) -> Run:
    """Return the run that `to_trec` wrote."""
    run: Run = {}
    for line in text.splitlines():
        query, _, passage, _, score, _ = line.split()
        run.setdefault(query, {})[passage] = float(score)
    return run
