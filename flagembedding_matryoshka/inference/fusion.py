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

from flagembedding_matryoshka.inference.inputs import MISSING, as_iterable, as_list, excerpt

T = TypeVar("T")
ORDER = "order"
"""The value of `first_stage` that takes the candidates' order for the first stage's ranking."""
AUTO = "auto"
"""The value of `fusion` that takes the weight from the plan."""
ROUNDING = 1e-5
"""Share of the largest score, in float32, by which the scores of equal documents may differ."""
RANK_OFFSET = 60
"""Added to a rank before its reciprocal is taken: Cormack, Clarke and Büttcher, Reciprocal Rank Fusion, SIGIR 2009."""


@dataclass(frozen=True)
class Fusion:
    """First-stage scores of the candidates of a task, and their weight.

    Attributes:
        weight: of the first stage, at least 0.
        first_stage: the first-stage score of each sequence, batch after batch.
    """

    weight: float
    first_stage: Sequence[float]

    def fuse(self, scores: Tensor, places: Tensor) -> Tensor:
        """Fuse the scores of some candidates of one query.

        Args:
            scores: (sequences,) of all sequences, batch after batch.
            places: (candidates,) int64, the places of the candidates among the sequences.

        Returns:
            (candidates,) float64.
        """
        return fuse(scores[places], self._values[places], self.weight)

    @cached_property
    def _values(self) -> Tensor:
        return torch.tensor(self.first_stage, dtype=torch.float64)


def fuse(scores: Tensor, first_stage: Tensor, weight: float) -> Tensor:
    """Add the standard scores of two scorers: z(scores) + weight · z(first_stage).

    Args:
        scores: (candidates,) the re-ranker's scores of one query's candidates, all read at one exit.
        first_stage: (candidates,) the first stage's scores of the same candidates.
        weight: of the first stage, at least 0.

    Returns:
        (candidates,) float64.
    """
    return standard_scores(scores, ROUNDING) + weight * standard_scores(first_stage)


def standard_scores(values: Tensor, rounding: float = 0.0) -> Tensor:
    """(candidates,) float64 of mean 0 and standard deviation 1; zeros if all values are equal.

    Args:
        rounding: values that differ by at most this share of the largest magnitude are equal. Otherwise the rounding
            errors of equal documents would become standard scores of ±1.
    """
    values = values.double()
    if not len(values) or bool(values.max() - values.min() <= rounding * values.abs().max()):
        return torch.zeros_like(values)
    # From 0 to 1 no square overflows, and none of all underflows.
    values = values / values.abs().max()
    values = values - values.min()
    values = values / values.max()
    return (values - values.mean()) / values.std(correction=0)


def best_first(fused: Tensor, scores: Tensor) -> Tensor:
    """(candidates,) int64: places in descending order of the fused score, then of the score; ties keep their order.

    Two scores that differ by less than float64 holds beside the others have equal standard scores.
    """
    by_score = scores.argsort(descending=True, stable=True)
    return by_score[fused[by_score].argsort(descending=True, stable=True)]


def reciprocal_ranks(candidates: int) -> list[float]:
    """1 / (60 + rank) of each candidate, which stand in the order of the first stage's ranking."""
    return [1 / (RANK_OFFSET + rank) for rank in range(1, candidates + 1)]


def read_first_stage(
    lists: Iterable[tuple[str, list[T]]], first_stage_scores: Iterable[Iterable[Any]] | None, first_stage: str | None
) -> Iterator[tuple[str, list[T], list[float] | None]]:
    """Each query with its documents and the first stage's scores of them, as they come.

    Args:
        first_stage_scores: for each query a score, or None, for each document.
        first_stage: "order" takes reciprocal ranks, by the order of the documents.

    Yields:
        None in place of the scores if neither is given.

    Raises:
        TypeError: if the scores are no list, or as `as_first_stage`.
        ValueError: if both are given, `first_stage` has another value, there are not as many lists of scores as
            queries, or as `as_first_stage`. What is wrong with a list is raised when the list is read.
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
            raise ValueError(
                f"there must be as many queries as lists of first_stage_scores, but list {number} is missing."
            )
        values = as_list(f"first_stage_scores of query {number}", values)
        yield query, documents, as_first_stage(number, values, len(documents))
    if next(scores, MISSING) is not MISSING:
        raise ValueError(
            f"there must be as many queries as lists of first_stage_scores, but query {number + 1} is missing."
        )


def as_first_stage(query: int, values: Sequence[Any], candidates: int) -> list[float]:
    """Check the first stage's scores of one query's candidates.

    Args:
        query: number of the query, for errors.
        values: a score for each candidate, a number or a tensor of one; None if the first stage did not find the
            candidate. Such a candidate gets the lowest of the query's scores, and 0 if the first stage found none.

    Raises:
        TypeError: if a value is neither a number nor None.
        ValueError: if a value is not finite, or there are not as many values as candidates.
    """
    if len(values) != candidates:
        raise ValueError(f"query {query} has {len(values)} first_stage_scores, but {candidates} candidates.")
    name = f"first_stage_scores of query {query}: value"
    found = [as_first_stage_score(f"{name} {place}", value) for place, value in enumerate(values)]
    lowest = min((number for number in found if number is not None), default=0.0)
    return [lowest if number is None else number for number in found]


def as_first_stage_score(name: str, value: Any) -> float | None:
    """Check the first stage's score of one candidate; None if the first stage did not find the candidate.

    Args:
        name: of the value, for errors.

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
    """The weight that a value of `fusion` asks for; None is no fusion.

    Args:
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
        TypeError: if it is no number.
        ValueError: if it is negative or not finite.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"fusion must be a number, {AUTO!r} or None, got {excerpt(value)}.")
    weight = _as_float(value)
    if not 0 <= weight < math.inf:
        raise ValueError(f"fusion is {excerpt(value)}, but must be finite and at least 0.")
    return weight


def _as_float(value: Real) -> float:
    """The nearest float; infinite beyond the largest."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
