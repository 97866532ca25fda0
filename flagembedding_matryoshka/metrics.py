"""Measures of rankings, in numpy: nDCG and reciprocal rank of many lists at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]


def rank_grades(scores: ArrayLike, grades: ArrayLike, is_padding: ArrayLike = False) -> Values:
    """Sort the grades of each list by the scores, the best first.

    Of equal scores the lowest grade comes first: a model that gives one score to all passages has the worst ranking,
    and not that of the order in which they were given.

    Args:
        scores: (..., passages) float.
        grades: (..., passages), above 0 on relevant passages; shapes broadcast.
        is_padding: (..., passages) bool, True behind the end of a list. Its grades are 0 and come last.

    Returns:
        (..., passages) float64.

    Raises:
        ValueError: if a score is NaN, with its place.
    """
    scores, grades, is_padding = np.broadcast_arrays(
        np.asarray(scores, dtype=np.float64), np.asarray(grades, dtype=np.float64), np.asarray(is_padding, dtype=bool)
    )
    unordered = np.argwhere(np.isnan(scores) & ~is_padding)
    if len(unordered):
        raise ValueError(f"the score at {tuple(unordered[0].tolist())} is NaN, which has no rank.")
    grades = np.where(is_padding, 0.0, grades)
    order = np.lexsort((grades, np.where(is_padding, 0.0, -scores), is_padding), axis=-1)
    return np.take_along_axis(grades, order, axis=-1)


def ndcg(ranked: ArrayLike, k: int, judged: ArrayLike | None = None) -> Values:
    """Return nDCG@k of each list, with the grade as the gain (Järvelin and Kekäläinen, 2002), as trec_eval does.

    Args:
        ranked: (..., passages) grades in the order of the ranking; those below 0 count as 0.
        judged: (..., any) grades of all judged passages, in any order, of which the ideal ranking is made. None is
            `ranked`.

    Returns:
        (...,) float64 in [0, 1]; 0 where no passage is relevant.
    """
    ranked = np.asarray(ranked, dtype=np.float64)
    ideal = _dcg(-np.sort(-np.asarray(ranked if judged is None else judged, dtype=np.float64), axis=-1), k)
    return np.divide(_dcg(ranked, k), ideal, out=np.zeros(ranked.shape[:-1]), where=ideal > 0)


def reciprocal_rank(ranked: ArrayLike, k: int) -> Values:
    """Return 1 / the rank of the first relevant passage, 0 if it is not among the first `k`.

    Args:
        ranked: (..., passages) grades in the order of the ranking.

    Returns:
        (...,) float64; its mean over queries is MRR@k.
    """
    is_relevant = np.asarray(ranked)[..., :k] > 0
    return np.where(is_relevant.any(-1), 1.0 / (1 + is_relevant.argmax(-1)), 0.0)


def _dcg(ranked: Values, k: int) -> Values:
    gains = np.maximum(ranked[..., :k], 0.0)
    return (gains / np.log2(np.arange(2, gains.shape[-1] + 2))).sum(-1)
