"""Measures of agreement between two rankings of the same candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean

from scipy.stats import kendalltau

from benchmarks.ablations.ranking import Outcome
from flagembedding_matryoshka.evaluation.runs import Run, ranking


def kendall_tau(run: Run, reference: Run) -> list[float]:
    """Return Kendall's tau of two orders of each query's candidates: 1 is the same order, −1 the reverse.

    Queries with a single candidate are left out. Ties are broken as in all measures.
    """
    taus = []
    for query, scores in reference.items():
        if len(scores) > 1:
            places = {passage: place for place, passage in enumerate(ranking(run[query]))}
            order = [places[passage] for passage in ranking(scores)]
            taus.append(float(kendalltau(range(len(order)), order).statistic))
    return taus


def overlap(run: Run, reference: Run, top: int) -> list[float]:
    """Return the fraction of each query's first `top` candidates that two orders have in common."""
    shares = []
    for query, scores in reference.items():
        first = set(ranking(scores)[:top])
        shares.append(len(first & set(ranking(run[query])[:top])) / len(first))
    return shares


MEASURES: dict[str, Callable[[Run, Run], list[float]]] = {
    "Kendall's tau": kendall_tau,
    "first the same": partial(overlap, top=1),
    "first ten in common": partial(overlap, top=10),
}


def agreement(
    measure: str, ranked: Mapping[str, Outcome], reference: Mapping[str, Outcome], scope: Sequence[str]
) -> float:
    """Return the mean over all queries of the collections in `scope`.

    Raises:
        ValueError: if no query has two candidates.
    """
    values = [value for name in scope for value in MEASURES[measure](ranked[name].run, reference[name].run)]
    if not values:
        raise ValueError(f"{measure}: no query of {list(scope)} has two candidates, whose order could be compared")
    return fmean(values)
