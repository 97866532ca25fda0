"""Whether two settings differ by more than the choice of queries explains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap, permutation_test

RESAMPLES = 9999
AT_ONCE = 1000
LEVEL = 0.95


def paired_p_value(values: Sequence[float], reference: Sequence[float]) -> float:
    """Two-sided p-value of a paired randomisation test: how often do differences of random sign lie as far from 0?

    Exact where there are no more than `RESAMPLES` sign patterns, so that of a single query it is 1. Smucker, Allan and
    Carterette (CIKM 2007) compare it with other tests for information retrieval.

    Args:
        values, reference: one value for each query.
    """
    differences = np.subtract(values, reference)
    if len(differences) < 2:
        return 1.0
    tested = permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, batch=AT_ONCE, rng=0
    )
    return float(tested.pvalue)


def paired_interval(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean difference, None for a single query.

    The percentiles of a paired bootstrap are its ends (Efron and Tibshirani, An introduction to the bootstrap, 1993,
    chapter 13). Unlike a p-value after `holm` it is of one comparison: of twenty intervals, one misses by chance.

    Args:
        values, reference: one value for each query.
    """
    return mean_interval(np.subtract(values, reference))


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of a mean, by the bootstrap of `paired_interval`.

    Args:
        values: one value for each query.

    Returns:
        None for fewer than two values.
    """
    if len(values) < 2:
        return None
    drawn = bootstrap(
        *((values,), np.mean),
        n_resamples=RESAMPLES,
        batch=AT_ONCE,
        confidence_level=LEVEL,
        method="percentile",
        rng=0,
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that, of all that are below a level, any is wrong with at most that probability.

    Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
