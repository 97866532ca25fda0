"""Significance of differences between settings: p-values, confidence intervals and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap, permutation_test

RESAMPLES = 9999
BATCH = 1000
"""Number of resamples in memory at a time."""
LEVEL = 0.95


def paired_p_value(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the two-sided p-value of a paired randomisation test.

    It is the share of random signs of the differences whose mean is at least as far from 0. With at most `RESAMPLES`
    sign patterns the test is exact. For a single query the p-value is 1. Smucker, Allan and Carterette (CIKM 2007)
    compare the test with others for information retrieval.

    Args:
        values, reference: one value for each query.
    """
    differences = np.subtract(values, reference)
    if len(differences) < 2:
        return 1.0
    tested = permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, batch=BATCH, rng=0
    )
    return float(tested.pvalue)


def paired_interval(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean difference, None for a single query.

    It is the percentile interval of a paired bootstrap (Efron and Tibshirani, An introduction to the bootstrap, 1993,
    chapter 13). It is not corrected for several comparisons, as p-values are by `holm`: one of twenty intervals is
    expected to miss.

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
        batch=BATCH,
        confidence_level=LEVEL,
        method="percentile",
        rng=0,
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values with Holm's correction for a family of tests.

    The probability that any corrected p-value of a true null hypothesis is below a level is at most that level (Holm, A
    simple sequentially rejective multiple test procedure, 1979).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
