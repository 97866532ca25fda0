"""Whether two settings differ by more than the choice of queries explains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import permutation_test

RESAMPLES = 9999
AT_ONCE = 1000


def paired_p_value(values: Sequence[float], reference: Sequence[float]) -> float:
    """Two-sided p-value of a paired randomisation test: how often do differences of random sign lie as far from 0?

    Exact where there are no more than `RESAMPLES` sign patterns. Smucker, Allan and Carterette (CIKM 2007) compare it
    with other tests for information retrieval.

    Args:
        values, reference: one value for each query.
    """
    differences = np.subtract(values, reference)
    tested = permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, batch=AT_ONCE, rng=0
    )
    return float(tested.pvalue)


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
