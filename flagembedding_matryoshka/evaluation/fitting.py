"""Fitting what scores mean: monotone maps to the probability that a candidate is judged relevant."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from flagembedding_matryoshka.evaluation.calibration import (
    Calibrated,
    Labelled,
    expected_calibration_error,
    labelled,
)
from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.halves import Halves
from flagembedding_matryoshka.evaluation.metrics import Run
from flagembedding_matryoshka.inference.calibration import Calibration, Isotonic, Platt
from flagembedding_matryoshka.setting import Setting

try:
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
except ImportError as error:
    raise ImportError("calibrating needs scikit-learn: pip install flagembedding_matryoshka[evaluation]") from error

FOLDS = 5
NO_PENALTY = 1e10


def calibrate(runs: Mapping[Setting, Run], candidates: Candidates, halves: Halves) -> list[Calibrated]:
    """A map for each setting, none of them a cascade: what a cascade scores is scored as such settings do.

    Args:
        candidates: of which both halves have relevant and irrelevant ones, see `refuse_one_kind`.
    """
    found = []
    for setting, run in runs.items():
        fitting, held_out = (labelled(run, candidates, places) for places in (halves.choosing, halves.held_out))
        calibration = fit(fitting)
        scores = torch.from_numpy(held_out.scores)
        errors = [expected_calibration_error(made(scores), held_out) for made in (torch.sigmoid, calibration)]
        found.append(Calibrated(setting, calibration, *errors))
    return found


def fit(data: Labelled) -> Calibration:
    """Isotonic regression or Platt's sigmoid, whichever has the smaller Brier score on queries that it was not fitted
    to, by cross-validation; fitted to all of them."""
    methods: tuple[Callable[[np.ndarray, np.ndarray], Calibration], ...] = (fit_platt, fit_isotonic)
    folds = min(FOLDS, len(set(data.queries.tolist())))
    if folds < 2:
        return fit_platt(data.scores, data.relevant)
    losses = [0.0 for _ in methods]
    for kept, left in GroupKFold(folds).split(data.scores, data.relevant, data.queries):
        for number, method in enumerate(methods):
            predicted = method(data.scores[kept], data.relevant[kept])(torch.from_numpy(data.scores[left])).numpy()
            losses[number] += float(np.square(predicted - data.relevant[left]).sum())
    return methods[losses.index(min(losses))](data.scores, data.relevant)


def fit_platt(scores: np.ndarray, relevant: np.ndarray) -> Platt:
    """Platt's sigmoid, to his targets: as if a relevant and an irrelevant one more had been seen.

    Where scores fall with relevance the best slope that does not fall is 0: the share of relevant ones.
    """
    found, others = int(relevant.sum()), int((~relevant).sum())
    targets = np.where(relevant, (found + 1) / (found + 2), 1 / (others + 2))
    model = LogisticRegression(C=NO_PENALTY, tol=1e-8, max_iter=1000)
    twice = np.repeat([True, False], len(scores))
    spread = max(float(scores.std()), 1e-12)
    inputs = np.tile((scores - scores.mean()) / spread, 2)[:, None]
    model.fit(inputs, twice, sample_weight=np.concatenate([targets, 1 - targets]))
    slope = float(model.coef_[0, 0]) / spread
    if slope <= 0:
        share = float(targets.mean())
        return Platt(0.0, float(np.log(share / (1 - share))))
    return Platt(slope, float(model.intercept_[0]) - slope * float(scores.mean()))


def fit_isotonic(scores: np.ndarray, relevant: np.ndarray) -> Isotonic:
    """The rising step-wise function that is nearest to relevance, its corners joined by straight lines."""
    model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, relevant)
    return Isotonic(model.X_thresholds_.tolist(), model.y_thresholds_.tolist())
