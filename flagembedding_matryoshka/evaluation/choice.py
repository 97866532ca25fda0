"""What one half of the queries chooses, and what the other half says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flagembedding_matryoshka.evaluation.halves import Halves, at
from flagembedding_matryoshka.evaluation.metrics import QUALITY, mean
from flagembedding_matryoshka.evaluation.pareto import pareto_front
from flagembedding_matryoshka.evaluation.significance import holm, paired_interval, paired_p_value
from flagembedding_matryoshka.evaluation.store import Result
from flagembedding_matryoshka.inference.calibration import Calibration
from flagembedding_matryoshka.inference.plan import Measured
from flagembedding_matryoshka.setting import Setting


@dataclass(frozen=True)
class Chosen:
    """A setting that no other beats on the choosing half, in operations and nDCG@10 at once.

    Attributes:
        flops_share: of the full network's operations, on all queries.
        ndcg_share: of its nDCG@10, on the half that chose.
        held_out_share: the same on the other half.
        change: of nDCG@10 against the full network's there.
        interval, p_value: of that change, as in `Compared`; None for the full network itself.
    """

    setting: Setting
    flops_share: float
    ndcg_share: float
    held_out_share: float
    change: float
    interval: tuple[float, float] | None
    p_value: float | None

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self.setting) | {name: value for name, value in vars(self).items() if name != "setting"}


def finds_in_both(results: Sequence[Result], full: Setting, halves: Halves) -> bool:
    """Whether the full network finds anything in each half, so that there are shares of it."""
    (reference,) = (result for result in results if result.setting == full)
    return all(any(at(reference.per_query[QUALITY], places)) for places in (halves.choosing, halves.held_out))


def measured(
    results: Sequence[Result], full: Setting, halves: Halves, calibrations: Mapping[Setting, Calibration] | None = None
) -> tuple[Measured, ...]:
    """Settings as a plan holds them: by the choosing half, with the share that they keep on the other beside.

    Raises:
        ValueError: if the full network finds nothing in a half, so that there is no share of what it finds.
    """
    (reference,) = (result for result in results if result.setting == full)

    def shares(name: str, places: Sequence[int]) -> list[float]:
        reached = mean(at(reference.per_query[QUALITY], places))
        if not reached:
            raise ValueError(
                f"the full network's {QUALITY} is 0 on the {len(places)} {name} queries: a plan holds shares of it"
            )
        return [mean(at(result.per_query[QUALITY], places)) / reached for result in results]

    return tuple(
        Measured(
            result.setting,
            result.flops_per_pair / reference.flops_per_pair,
            chosen_by,
            held_out,
            (calibrations or {}).get(result.setting),
        )
        for result, chosen_by, held_out in zip(
            results, shares("choosing", halves.choosing), shares("held-out", halves.held_out), strict=True
        )
    )


def chosen_and_held_out(results: Sequence[Result], full: Setting, halves: Halves) -> list[Chosen]:
    """The choosing half's Pareto front, the cheapest first, reported on the other half.

    p-values are of a paired randomisation test, after Holm for the whole front.

    Raises:
        ValueError: as `measured`.
    """
    settings = measured(results, full, halves)
    front = pareto_front([(item.flops_share, item.ndcg_share) for item in settings])
    picked = sorted(
        (pair for pair, on_front in zip(zip(settings, results, strict=True), front, strict=True) if on_front),
        key=lambda pair: pair[0].flops_share,
    )
    (reference,) = (result for result in results if result.setting == full)
    reached = at(reference.per_query[QUALITY], halves.held_out)
    held_out = [at(result.per_query[QUALITY], halves.held_out) for _, result in picked]
    others = [values for (item, _), values in zip(picked, held_out, strict=True) if item.setting != full]
    p_values = iter(holm([paired_p_value(values, reached) for values in others]))
    return [
        Chosen(
            item.setting,
            item.flops_share,
            item.ndcg_share,
            mean(values) / mean(reached),
            mean(values) - mean(reached),
            None if item.setting == full else paired_interval(values, reached),
            None if item.setting == full else next(p_values),
        )
        for (item, _), values in zip(picked, held_out, strict=True)
    ]
