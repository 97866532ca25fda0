"""Measures of rankings, in numpy: nDCG, reciprocal rank and recall, of one list or of many lists at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]


def rank_grades(scores: ArrayLike, grades: ArrayLike, is_padding: ArrayLike = False) -> Values:
    """Sort the grades of each list by the scores, best first.

    Among equal scores the lowest grade comes first. So a model with one score for all passages has the worst ranking,
    and does not profit from the order of its input.

    Args:
        scores: (..., passages) float.
        grades: (..., passages), above 0 on relevant passages; shapes broadcast.
        is_padding: (..., passages) bool, True after the end of a list; default no padding. Grades there are 0 and come
            last.

    Returns:
        (..., passages) float64.

    Raises:
        ValueError: if a score is NaN; names its index.
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
    """Return nDCG@k of each list, with the grade as the gain (Järvelin and Kekäläinen, TOIS 2002), as in trec_eval.

    Args:
        ranked: (..., passages) grades in the order of the ranking; negative grades count as 0.
        k: number of first passages that count.
        judged: (..., any) grades of all judged passages, in any order, for the ideal ranking. None is `ranked`.

    Returns:
        (...,) float64 in [0, 1]; 0 for a list without a relevant passage.
    """
    ranked = np.asarray(ranked, dtype=np.float64)
    ideal = _dcg(-np.sort(-np.asarray(ranked if judged is None else judged, dtype=np.float64), axis=-1), k)
    return np.divide(_dcg(ranked, k), ideal, out=np.zeros(ranked.shape[:-1]), where=ideal > 0)


def reciprocal_rank(ranked: ArrayLike, k: int) -> Values:
    """Return 1 / the rank of the first relevant passage, 0 if none is among the first `k`.

    Args:
        ranked: (..., passages) grades in the order of the ranking.
        k: number of first passages that count.

    Returns:
        (...,) float64; its mean over queries is MRR@k.
    """
    is_relevant = np.asarray(ranked)[..., :k] > 0
    return np.where(is_relevant, 1.0 / np.arange(1, is_relevant.shape[-1] + 1), 0.0).max(-1, initial=0.0)


def recall(ranked: ArrayLike, k: int, judged: ArrayLike | None = None) -> Values:
    """Return the share of the relevant passages that are among the first `k`.

    Args:
        ranked: (..., passages) grades in the order of the ranking.
        k: number of first passages that count.
        judged: (..., any) grades of all judged passages, in any order. None is `ranked`.

    Returns:
        (...,) float64 in [0, 1]; 0 for a list without a relevant passage.
    """
    found = (np.asarray(ranked)[..., :k] > 0).sum(-1)
    relevant = (np.asarray(ranked if judged is None else judged) > 0).sum(-1)
    return np.divide(found, relevant, out=np.zeros(found.shape), where=relevant > 0)


def _dcg(ranked: Values, k: int) -> Values:
    gains = np.maximum(ranked[..., :k], 0.0)
    return (gains / np.log2(np.arange(2, gains.shape[-1] + 2))).sum(-1)
