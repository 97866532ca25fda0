"""Fusion of a re-ranker's scores with those of the first stage, the retriever that found the candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from flagembedding_matryoshka.inference.inputs import MISSING, as_iterable, excerpt

T = TypeVar("T")
ORDER = "order"
"""The value of `first_stage` for candidates in the first stage's order."""
AUTO = "auto"
"""The value of `fusion` that takes the weight from the plan."""
ROUNDING = 1e-5
"""Scores of equal documents may differ by this fraction of the largest score, by rounding in float32."""
RANK_OFFSET = 60
"""Added to a rank before its reciprocal is taken: Cormack, Clarke and Büttcher, Reciprocal Rank Fusion, SIGIR 2009."""


@dataclass(frozen=True)
class Fusion:
    """First-stage scores of a task's candidates, and their weight.

    Attributes:
        weight: weight of the first stage, at least 0.
        first_stage: the first-stage score of each sequence, batch after batch.
    """

    weight: float
    first_stage: Sequence[float]

    def fuse(self, scores: Tensor, places: Tensor) -> Tensor:
        """Fuse the scores of some candidates of one query.

        Args:
            scores: (sequences,) float, the re-ranker's scores of all sequences, batch after batch.
            places: (candidates,) int64 indices of the candidates into `scores`.

        Returns:
            (candidates,) float64.
        """
        return fuse(scores[places], self._values[places], self.weight)

    @cached_property
    def _values(self) -> Tensor:
        return torch.tensor(self.first_stage, dtype=torch.float64)


def fuse(scores: Tensor, first_stage: Tensor, weight: float) -> Tensor:
    """Add the standard scores of two scorers: z(scores) + weight · z(first_stage).

    z is zero mean, unit variance normalisation (ZMUV: Montague and Aslam, Relevance score normalization for
    metasearch, CIKM 2001).

    Args:
        scores: (candidates,) the re-ranker's scores of one query's candidates, all read at one exit.
        first_stage: (candidates,) the first stage's scores of the same candidates.
        weight: weight of the first stage, at least 0.

    Returns:
        (candidates,) float64.
    """
    return standard_scores(scores, ROUNDING) + weight * standard_scores(first_stage)


def standard_scores(values: Tensor, rounding: float = 0.0) -> Tensor:
    """Return (x - mean) / standard deviation of each value, by the population's standard deviation.

    Args:
        values: (candidates,) finite.
        rounding: values that differ by at most this fraction of the largest magnitude are equal. Otherwise the
            rounding errors of equal documents would become standard scores of ±1.

    Returns:
        (candidates,) float64 of mean 0 and standard deviation 1; zeros if all values are equal.
    """
    values = values.double()
    if not len(values) or bool(values.max() - values.min() <= rounding * values.abs().max()):
        return torch.zeros_like(values)
    # Scaled to [0, 1], squares do not overflow, and their sum does not underflow.
    values = values / values.abs().max()
    values = values - values.min()
    values = values / values.max()
    return (values - values.mean()) / values.std(correction=0)


def best_first(fused: Tensor, scores: Tensor) -> Tensor:
    """Return (candidates,) int64: indices in descending order of the fused score, then of the score.

    Ties keep their order. The score is compared because close scores can have the same standard score in float64.
    """
    by_score = scores.argsort(descending=True, stable=True)
    return by_score[fused[by_score].argsort(descending=True, stable=True)]


def reciprocal_ranks(candidates: int) -> list[float]:
    """Return 1 / (60 + rank) for each of so many candidates, in the first stage's order, rank 1 first."""
    return [1 / (RANK_OFFSET + rank) for rank in range(1, candidates + 1)]


def read_first_stage(
    lists: Iterable[tuple[str, list[T]]], first_stage_scores: Iterable[Iterable[Any]] | None, first_stage: str | None
) -> Iterator[tuple[str, list[T], list[float] | None]]:
    """Yield each query with its documents and their first-stage scores.

    Args:
        lists: each query with its documents.
        first_stage_scores: for each query a list with a score, or None, for each document; None is no scores.
        first_stage: "order" gives each document its reciprocal rank in the order of the documents; None is no order.

    Yields:
        (query, documents, scores); scores is None if neither argument is given.

    Raises:
        TypeError: if the scores are no list, or as `as_first_stage`.
        ValueError: if both arguments are given, `first_stage` has another value, the number of lists of scores is not
            the number of queries, or as `as_first_stage`. Errors of a list are raised when the list is read.
    """
    if first_stage not in (None, ORDER):
        raise ValueError(f"first_stage is {excerpt(first_stage)}, but must be {ORDER!r} or None.")
    if first_stage_scores is not None and first_stage is not None:
        raise ValueError(f"first_stage_scores and first_stage={first_stage!r}: give one of them.")
    if first_stage_scores is not None:
        return _read_scores(lists, iter(as_iterable("first_stage_scores", first_stage_scores)))
    if first_stage is not None:
        return ((query, documents, reciprocal_ranks(len(documents))) for query, documents in lists)
    return ((query, documents, None) for query, documents in lists)


def _read_scores(
    lists: Iterable[tuple[str, list[T]]], scores: Iterator[Any]
) -> Iterator[tuple[str, list[T], list[float]]]:
    number = -1
    for number, (query, documents) in enumerate(lists):
        values = next(scores, MISSING)
        if values is MISSING:
            raise ValueError(f"each query needs a list of first_stage_scores, but list {number} is missing.")
        values = list(as_iterable(f"first_stage_scores of query {number}", values))
        yield query, documents, as_first_stage(number, values, len(documents))
    if next(scores, MISSING) is not MISSING:
        raise ValueError(f"each list of first_stage_scores needs a query, but query {number + 1} is missing.")


def as_first_stage(query: int, values: Sequence[Any], candidates: int) -> list[float]:
    """Check the first stage's scores of one query's candidates, and fill in missing ones.

    Args:
        query: number of the query, for errors.
        values: for each candidate a number, a tensor of one number, or None if the first stage did not find it.
        candidates: number of candidates.

    Returns:
        a score for each candidate. A missing score is the query's lowest one, or 0 if all are missing.

    Raises:
        TypeError: if a value is neither a number nor None.
        ValueError: if a value is not finite, or the number of values is not the number of candidates.
    """
    if len(values) != candidates:
        raise ValueError(f"query {query} has {len(values)} first_stage_scores, but {candidates} candidates.")
    name = f"first_stage_scores of query {query}: value"
    found = [as_first_stage_score(f"{name} {place}", value) for place, value in enumerate(values)]
    lowest = min((number for number in found if number is not None), default=0.0)
    return [lowest if number is None else number for number in found]


def as_first_stage_score(name: str, value: Any) -> float | None:
    """Check the first stage's score of one candidate.

    Args:
        name: name of the value, for errors.
        value: a number, a tensor of one number, or None if the first stage did not find the candidate.

    Returns:
        the score; None for None.

    Raises:
        TypeError: if the value is neither a number nor None.
        ValueError: if the value is not finite.
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, or None, got {excerpt(value)}.")
    number = _as_float(value)
    if not math.isfinite(number):
        raise ValueError(
            f"{name} is {excerpt(value)}, but must be finite, or None for a candidate that the first stage did not "
            "find."
        )
    return number


def as_fusion(value: Any, of_plan: Callable[[], float]) -> float | None:
    """Return the weight for a value of `fusion`; None is no fusion.

    Args:
        value: a number, "auto" for the weight in the plan, or None.
        of_plan: returns the weight in the plan, or raises.

    Raises:
        FileNotFoundError, ValueError: as `of_plan`, if the value is "auto".
        TypeError, ValueError: as `as_weight`.
    """
    if value is None:
        return None
    return of_plan() if isinstance(value, str) and value == AUTO else as_weight(value)


def as_weight(value: Any) -> float:
    """Check a fusion weight.

    Raises:
        TypeError: if the value is not a number.
        ValueError: if the value is negative or not finite.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"fusion must be a number, {AUTO!r} or None, got {excerpt(value)}.")
    weight = _as_float(value)
    if not 0 <= weight < math.inf:
        raise ValueError(f"fusion is {excerpt(value)}, but must be finite and at least 0.")
    return weight


def _as_float(value: Real) -> float:
    """Return the nearest float; infinity for numbers above the largest float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
