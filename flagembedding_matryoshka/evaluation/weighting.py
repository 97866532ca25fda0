"""Runs by fused scores, and the choice of their weights by half of the queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.halves import Halves, at
from flagembedding_matryoshka.evaluation.metrics import Run, mean, quality_of
from flagembedding_matryoshka.inference.fusion import ROUNDING, standard_scores

WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0)
"""Weights to try by default."""


@dataclass(frozen=True)
class WeightChoice:
    """The weights with the best ranking on the choosing half, one for each scorer but the first.

    Attributes:
        weights: the best weights; of equally good ones the weights with the smallest sum.
        qualities: nDCG@10 on the choosing half for each combination of weights that was tried.
    """

    weights: tuple[float, ...]
    qualities: Mapping[tuple[float, ...], float]


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


def choose_weights(
    candidates: Candidates, run: Run, others: Sequence[Run], weights: Sequence[float], halves: Halves
) -> WeightChoice:
    """Try all combinations of weights on the choosing half. Scores and judgements of the other half are not read.

    Args:
        run: scores with weight 1.
        others: scores to add to `run`.
        weights: weights to try for each of `others`.
    """
    queries = at(list(candidates.passages), halves.choosing)
    qualities = {}
    for tried in sorted(product(sorted(set(weights)), repeat=len(others)), key=sum):
        fused = fuse_runs(candidates, run, list(zip(others, tried, strict=True)), queries)
        qualities[tried] = mean(quality_of(candidates, fused, queries))
    return WeightChoice(max(qualities, key=qualities.__getitem__), qualities)
