"""How far probabilities are from what is judged relevant, before calibration and behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.halves import Halves, at
from flagembedding_matryoshka.evaluation.metrics import Run
from flagembedding_matryoshka.inference.calibration import Calibration, to_json
from flagembedding_matryoshka.setting import Setting

BINS = 15


@dataclass(frozen=True)
class Labelled:
    """Candidates of some queries: float64 scores, whether each is judged relevant, and the number of its query."""

    scores: np.ndarray
    relevant: np.ndarray
    queries: np.ndarray


@dataclass(frozen=True)
class Calibrated:
    """A setting's map.

    Attributes:
        calibration: fitted to the choosing half.
        before, after: expected calibration error on the other half, of the scores' sigmoid and of the map.
    """

    setting: Setting
    calibration: Calibration
    before: float
    after: float

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        errors = {"before": self.before, "after": self.after}
        return asdict(self.setting) | {"expected_calibration_error": errors, "calibration": to_json(self.calibration)}


def refuse_one_kind(candidates: Candidates, halves: Halves) -> None:
    """Raise ValueError if the candidates of a half are all relevant, or none is: there would be nothing to fit."""
    for name, places in (("choosing", halves.choosing), ("held-out", halves.held_out)):
        queries = at(list(candidates.passages), places)
        judged = candidates.collection.relevant
        kinds = [judged[query].get(passage, 0) > 0 for query in queries for passage in candidates.passages[query]]
        if len(set(kinds)) < 2:
            raise ValueError(
                f"{candidates.source}: of {len(kinds)} candidates of the {len(queries)} {name} queries "
                f"{'all' if any(kinds) else 'none'} are relevant: there is nothing to calibrate by"
            )


def labelled(run: Run, candidates: Candidates, places: Sequence[int]) -> Labelled:
    """Of the queries at these places; a candidate that nobody judged counts as not relevant, as in every measure."""
    rows = [
        (score, candidates.collection.relevant[query].get(passage, 0) > 0, number)
        for number, query in enumerate(at(list(candidates.passages), places))
        for passage, score in run.get(query, {}).items()
    ]
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return Labelled(*(np.array(column, dtype=kind) for column, kind in zip(columns, (float, bool, int), strict=True)))


def expected_calibration_error(probabilities: torch.Tensor, data: Labelled) -> float:
    """|share of relevant − mean probability| in `BINS` bins of equal width, weighted by their candidates (Guo, Pleiss,
    Sun and Weinberger, ICML 2017)."""
    values = probabilities.double().numpy()
    bins = np.minimum((values * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=data.relevant - values, minlength=BINS)
    return float(np.abs(gaps).sum() / len(values))
