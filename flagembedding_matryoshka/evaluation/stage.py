"""All that is said of one first stage's candidates, and how reports say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from flagembedding_matryoshka.evaluation.baselines import Baseline
from flagembedding_matryoshka.evaluation.calibration import Calibrated
from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.choice import Chosen, chosen_and_held_out, finds_in_both
from flagembedding_matryoshka.evaluation.fusion import FIRST_STAGE, FusionReport
from flagembedding_matryoshka.evaluation.halves import Halves
from flagembedding_matryoshka.evaluation.metrics import QUALITY, mean
from flagembedding_matryoshka.evaluation.report import Compared, ComparedBaseline, compare
from flagembedding_matryoshka.evaluation.store import Result
from flagembedding_matryoshka.evaluation.table import (
    calibration_table,
    choice_table,
    fusion_table,
    markdown_table,
    orders_table,
    table,
    weights_table,
)
from flagembedding_matryoshka.setting import Setting

SETTINGS, FUSED, ORDERS = "r", "f", "o"
"""Marks of the tables whose rows are points of a chart."""


class Part(NamedTuple):
    """A table of a report.

    Attributes:
        said: its heading.
        table: Markdown.
        mark: first letter of the row ids, which points of a chart refer to; empty if no point does.
    """

    said: str
    table: str
    mark: str = ""


@dataclass(frozen=True)
class Stage:
    """What was measured on a first stage's candidates.

    Attributes:
        compared, baselines: on all queries, the candidates' own order first.
        halves: which queries choose, and which are held out.
        chosen: what the first half chooses, reported on the other; empty where that says nothing.
        calibrated: maps fitted to the first half, if they were asked for.
        fusion: fused orders; None without --fusion.
    """

    candidates: Candidates
    compared: Sequence[Compared]
    baselines: Sequence[ComparedBaseline]
    halves: Halves
    chosen: Sequence[Chosen]
    calibrated: Sequence[Calibrated] = field(default=())
    fusion: FusionReport | None = None

    @classmethod
    def of(
        cls,
        candidates: Candidates,
        results: Sequence[Result],
        baselines: Sequence[Baseline],
        full: Setting,
        calibrated: Sequence[Calibrated] = (),
        fusion: FusionReport | None = None,
    ) -> Stage:
        """Compare results and baselines with the full network, `full`."""
        halves = Halves.of(candidates.passages)
        compared, beside = compare(results, full, baselines)
        says_something = halves.are_two and finds_in_both(results, full, halves)
        chosen = chosen_and_held_out(results, full, halves) if says_something else []
        return cls(candidates, compared, beside, halves, chosen, calibrated, fusion)

    @property
    def about(self) -> str:
        """What was ranked, in a line."""
        passages = self.candidates.passages
        return f"{len(passages)} queries, {len(self.candidates)} pairs, {self.candidates.source}"

    def parts(self, chosen: Mapping[float, Setting]) -> list[Part]:
        """Return the tables of the report, in order.

        Args:
            chosen: setting that the model's own plan chooses for each budget.
        """
        sides = f"{len(self.halves.choosing)} queries, drawn by the hashes of their ids"
        others = f"the {len(self.halves.held_out)} others"
        compared = "All queries; changes are against the full network, with 95 % intervals, p-values after Holm for all"
        parts = [Part(compared, table(self.compared, self.baselines, chosen), SETTINGS)]
        if self.chosen:
            said = f"What a plan chooses by {sides}, in shares of the full network, and what {others} say of it"
            parts.append(Part(said, choice_table(self.chosen)))
        if self.calibrated:
            said = f"Expected calibration error on {others} of maps fitted to {sides}"
            parts.append(Part(said, calibration_table(self.calibrated)))
        if self.fusion is not None:
            tried = f"Fusion weights of the first stage, tried on {sides}; {self.fusion.weight:g} is chosen"
            parts.append(Part(tried, weights_table(self.fusion)))
            said = f"{QUALITY} of {others}, plain and fused at weight {self.fusion.weight:g}"
            tested = "p-values after Holm, one family for the full network and one for all other settings"
            parts.append(Part(f"{said}; {tested}", fusion_table(self.fusion), FUSED))
        if self.fusion is not None and self.fusion.orders:
            said = f"{QUALITY} of {others} by one scorer and by several, with weights that the first half chose"
            changes = f"changes are against {self.fusion.full} + {FIRST_STAGE}, p-values after Holm for all"
            parts.append(Part(f"{said}; {changes}", orders_table(self.fusion), ORDERS))
        return parts

    def as_json(self) -> dict[str, Any]:
        """All but the values of single queries."""
        return {
            "queries": len(self.candidates.passages),
            "pairs": len(self.candidates),
            "candidates": self.candidates.source,
            "baselines": [item.as_json() for item in self.baselines],
            "settings": [item.as_json() for item in self.compared],
            "halves": {name: len(places) for name, places in asdict(self.halves).items()},
            "held_out": [item.as_json() for item in self.chosen],
            "calibrated": [item.as_json() for item in self.calibrated],
            "fusion": None if self.fusion is None else self.fusion.as_json(),
        }


def side_by_side(stages: Mapping[str, Stage]) -> str:
    """nDCG@10 of the same orders over several first stages, by their names."""
    (first, *_) = stages.values()
    rows = [[QUALITY, *stages]]
    for number, beside in enumerate(first.baselines):
        orders = [mean(stage.baselines[number].baseline.per_query[QUALITY]) for stage in stages.values()]
        name = "as given" if number == 0 else beside.baseline.name
        rows.append([name, *(f"{quality:.4f}" for quality in orders)])
    for number, item in enumerate(first.compared):
        results = [stage.compared[number].result for stage in stages.values()]
        rows.append([str(item.result.setting), *(f"{result.mean(QUALITY):.4f}" for result in results)])
    reports = [stage.fusion for stage in stages.values() if stage.fusion is not None]
    if reports:
        rows.append(["fusion weight", *(f"{report.weight:g}" for report in reports)])
    for items in zip(*(report.settings for report in reports), strict=True):
        name = f"{items[0].result.setting}, fused"
        rows.append([name, *(f"{item.result.mean(QUALITY):.4f}" for item in items)])
    return markdown_table(rows)
