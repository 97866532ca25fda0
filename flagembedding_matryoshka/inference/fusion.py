"""Fusion of a re-ranker's scores with those of the first stage, the retriever that found the candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from flagembedding_matryoshka.inference.inputs import excerpt

ORDER = "order"
"""The value of `first_stage` that takes the candidates' order for the first stage's ranking."""
AUTO = "auto"
"""The value of `fusion` that takes the weight from the plan."""
RANK_OFFSET = 60
"""Added to a rank before its reciprocal is taken: Cormack, Clarke and Büttcher, Reciprocal Rank Fusion, SIGIR 2009."""


def fuse(scores: Tensor, first_stage: Tensor, weight: float) -> Tensor:
    """Add the standard scores of two scorers: z(scores) + weight · z(first_stage).

    Args:
        scores: (candidates,) the re-ranker's scores of one query's candidates, all read at one exit.
        first_stage: (candidates,) the first stage's scores of the same candidates.
        weight: of the first stage, at least 0.

    Returns:
        (candidates,) float64.
    """
    return standard_scores(scores) + weight * standard_scores(first_stage)


def standard_scores(values: Tensor) -> Tensor:
    """(candidates,) float64 of mean 0 and standard deviation 1; zeros if all values are equal."""
    values = values.double()
    if not len(values) or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    return (values - values.mean()) / values.std(correction=0)


def reciprocal_ranks(candidates: int) -> list[float]:
    """1 / (60 + rank) of each candidate, which stand in the order of the first stage's ranking."""
    return [1 / (RANK_OFFSET + rank) for rank in range(1, candidates + 1)]


def as_first_stage(query: int, values: Sequence[Any], candidates: int) -> list[float]:
    """Check the first stage's scores of one query's candidates.

    Args:
        query: number of the query, for errors.
        values: a score for each candidate; None if the first stage did not find the candidate. Such a candidate gets
            the lowest of the query's scores, and 0 if the first stage found none.

    Raises:
        TypeError: if a value is neither a number nor None.
        ValueError: if a value is not finite, or there are not as many values as candidates.
    """
    if len(values) != candidates:
        raise ValueError(f"query {query} has {len(values)} first_stage_scores, but {candidates} candidates.")
    for place, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(
                f"first_stage_scores of query {query}: value {place} must be a number, or None, got {excerpt(value)}."
            )
        if not math.isfinite(value):
            raise ValueError(f"first_stage_scores of query {query}: value {place} is {value}, but must be finite.")
    lowest = min((float(value) for value in values if value is not None), default=0.0)
    return [lowest if value is None else float(value) for value in values]


def as_weight(value: Any) -> float:
    """Check a fusion weight.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative or not finite.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"fusion must be a number, {AUTO!r} or None, got {excerpt(value)}.")
    weight = float(value)
    if not 0 <= weight < math.inf:
        raise ValueError(f"fusion is {value!r}, but must be finite and at least 0.")
    return weight
