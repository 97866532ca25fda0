"""Calibration: monotone maps from scores to probabilities of relevance, fitted on one half of the queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from flagembedding_matryoshka.evaluation.candidates import Candidates, Halves, take
from flagembedding_matryoshka.evaluation.runs import Run
from flagembedding_matryoshka.inference.calibration import Calibration, Isotonic, Platt, to_json
from flagembedding_matryoshka.setting import Setting

BINS = 15
"""Number of bins of the expected calibration error."""
LEAST_PROBABILITY = 1e-15
"""Probabilities are clipped to this and to 1 minus this for the logarithmic loss."""
FOLDS = 5
"""Number of folds of the cross-validation that chooses the method."""
MIN_RELEVANT = 50
"""With fewer relevant candidates, isotonic regression would fit single candidates and is not considered."""
NO_PENALTY = 1e10


@dataclass(frozen=True)
class Judgements:
    """Scores and judgements of the candidates of some queries.

    Attributes:
        scores: (candidates,) float64.
        relevant: (candidates,) bool, True if judged relevant.
        queries: (candidates,) int, the number of the candidate's query.
    """

    scores: np.ndarray
    relevant: np.ndarray
    queries: np.ndarray


@dataclass(frozen=True)
class ProbabilityErrors:
    """Errors of probabilities of relevance; lower is better.

    A constant has a small calibration error, too. Brier score and logarithmic loss also measure how well probabilities
    tell relevant candidates from others.

    Attributes:
        expected_calibration_error: as `expected_calibration_error` returns it.
        brier_score: mean squared difference to the judgement, 0 or 1 (Brier 1950).
        log_loss: mean negative logarithm of the probability of the judgement, in nats.
    """

    expected_calibration_error: float
    brier_score: float
    log_loss: float

    @classmethod
    def of(cls, probabilities: torch.Tensor, data: Judgements) -> ProbabilityErrors:
        """Return the errors of probabilities, (candidates,) in [0, 1], against their judgements."""
        values = probabilities.double().numpy()
        clipped = np.clip(values, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        return cls(
            expected_calibration_error(probabilities, data),
            float(np.square(values - data.relevant).mean()),
            float(-np.log(np.where(data.relevant, clipped, 1 - clipped)).mean()),
        )


@dataclass(frozen=True)
class SettingCalibration:
    """The calibration of a setting: a monotone map from scores to probabilities of relevance.

    Attributes:
        setting: the setting.
        calibration: the map, fitted to the choosing half.
        errors: errors of three probabilities on the held-out half: "sigmoid" of the scores, "calibrated", and the
            constant "base_rate", the fraction of relevant candidates in the choosing half.
    """

    setting: Setting
    calibration: Calibration
    errors: Mapping[str, ProbabilityErrors]

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        errors = {name: asdict(item) for name, item in self.errors.items()}
        return asdict(self.setting) | {"errors": errors, "calibration": to_json(self.calibration)}


def check_calibration(candidates: Candidates, halves: Halves) -> None:
    """Check that a calibration can be fitted.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if all candidates of a half are relevant, or none is.
    """
    if find_spec("sklearn") is None:
        raise ImportError("--calibrate needs scikit-learn: pip install flagembedding_matryoshka[evaluation]")
    for name, indices in (("choosing", halves.choosing), ("held-out", halves.held_out)):
        queries = take(list(candidates.passages), indices)
        judged = candidates.collection.relevant
        kinds = [judged[query].get(passage, 0) > 0 for query in queries for passage in candidates.passages[query]]
        if len(set(kinds)) < 2:
            raise ValueError(
                f"{candidates.source}: of {len(kinds)} candidates of the {len(queries)} {name} queries "
                f"{'all' if any(kinds) else 'none'} are relevant: a calibration needs candidates of both kinds"
            )


def judgements_of(run: Run, candidates: Candidates, indices: Sequence[int]) -> Judgements:
    """Return scores and judgements for some queries. A candidate without a judgement counts as irrelevant."""
    rows = [
        (score, candidates.collection.relevant[query].get(passage, 0) > 0, number)
        for number, query in enumerate(take(list(candidates.passages), indices))
        for passage, score in run.get(query, {}).items()
    ]
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return Judgements(*(np.array(column, dtype=kind) for column, kind in zip(columns, (float, bool, int), strict=True)))


def expected_calibration_error(probabilities: torch.Tensor, data: Judgements) -> float:
    """Return the mean of |fraction of relevant − mean probability| over bins, weighted by their candidates.

    Guo, Pleiss, Sun and Weinberger (ICML 2017) define it. Bins have equal mass (Nguyen and O'Connor, EMNLP 2015),
    because most candidates have small probabilities, and bins of equal width would hold nearly all of them in one.
    Candidates with equal probabilities are in the same bin.

    Args:
        probabilities: (candidates,) in [0, 1].
        data: their judgements.
    """
    values = probabilities.double().numpy()
    edges = np.unique(np.quantile(values, np.arange(1, BINS) / BINS, method="inverted_cdf"))
    bins = np.searchsorted(edges, values)
    gaps = np.bincount(bins, weights=data.relevant - values)
    return float(np.abs(gaps).sum() / len(values))


def calibrate(runs: Mapping[Setting, Run], candidates: Candidates, halves: Halves) -> list[SettingCalibration]:
    """Fit a calibration for each setting.

    Args:
        runs: scores of settings without a cascade. A cascade uses the calibrations of its exits.
        candidates: candidates that `check_calibration` accepts.
        halves: the halves of the queries.
    """
    found = []
    for setting, run in runs.items():
        choosing, held_out = (judgements_of(run, candidates, part) for part in (halves.choosing, halves.held_out))
        calibration = fit(choosing)
        scores = torch.from_numpy(held_out.scores)
        probabilities = {
            "sigmoid": scores.sigmoid(),
            "calibrated": calibration(scores),
            "base_rate": torch.full_like(scores, choosing.relevant.mean()),
        }
        errors = {name: ProbabilityErrors.of(values, held_out) for name, values in probabilities.items()}
        found.append(SettingCalibration(setting, calibration, errors))
    return found


def fit(data: Judgements) -> Calibration:
    """Fit isotonic regression or Platt's sigmoid, the one with the smaller Brier score in cross-validation.

    Folds have different queries. A single query, or fewer than `MIN_RELEVANT` relevant candidates, get Platt's sigmoid.
    """
    from sklearn.model_selection import GroupKFold

    methods: tuple[Callable[[np.ndarray, np.ndarray], Calibration], ...] = (fit_platt, fit_isotonic)
    folds = min(FOLDS, len(set(data.queries.tolist())))
    if folds < 2 or data.relevant.sum() < MIN_RELEVANT:
        return fit_platt(data.scores, data.relevant)
    losses = [0.0 for _ in methods]
    for kept, left in GroupKFold(folds).split(data.scores, data.relevant, data.queries):
        for number, method in enumerate(methods):
            predicted = method(data.scores[kept], data.relevant[kept])(torch.from_numpy(data.scores[left])).numpy()
            losses[number] += float(np.square(predicted - data.relevant[left]).sum())
    return methods[losses.index(min(losses))](data.scores, data.relevant)


def fit_platt(scores: np.ndarray, relevant: np.ndarray) -> Platt:
    """Fit Platt's sigmoid to his smoothed targets, as with one more relevant and one more irrelevant candidate.

    If scores fall with relevance the slope is 0, and the probability is the mean target.

    Args:
        scores: (candidates,) float64.
        relevant: (candidates,) bool.
    """
    from sklearn.linear_model import LogisticRegression

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
    """Fit isotonic regression, with linear interpolation between its steps.

    Probabilities are clipped to [1 / (n + 2), 1 - 1 / (n + 2)], because n candidates prove neither 0 nor 1.

    Args:
        scores: (candidates,) float64.
        relevant: (candidates,) bool.
    """
    from sklearn.isotonic import IsotonicRegression

    least = 1 / (len(scores) + 2)
    model = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(scores, relevant)
    return Isotonic(model.X_thresholds_.tolist(), model.y_thresholds_.tolist())
