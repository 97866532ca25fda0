"""The report on the candidates of one first stage: comparisons, their tables and their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from flagembedding_matryoshka.evaluation.baselines import Baseline
from flagembedding_matryoshka.evaluation.calibration import SettingCalibration
from flagembedding_matryoshka.evaluation.candidates import Candidates, Halves
from flagembedding_matryoshka.evaluation.comparison import (
    BaselineComparison,
    Choice,
    SettingComparison,
    choose_settings,
    compare,
    has_quality_in_both,
)
from flagembedding_matryoshka.evaluation.fusion import FIRST_STAGE, FusionResult
from flagembedding_matryoshka.evaluation.report.tables import (
    calibration_table,
    choice_table,
    fusion_table,
    markdown_table,
    orders_table,
    settings_table,
    weights_table,
)
from flagembedding_matryoshka.evaluation.results import Result
from flagembedding_matryoshka.evaluation.runs import QUALITY, mean
from flagembedding_matryoshka.setting import Setting

SETTINGS, FUSED, ORDERS = "r", "f", "o"
"""Marks of the tables whose rows are points of a chart: settings, fused settings and orders."""


class Table(NamedTuple):
    """A table of a report.

    Attributes:
        heading: its heading.
        markdown: the table.
        mark: first letter of the row ids, which points of a chart refer to; empty if no point does.
    """

    heading: str
    markdown: str
    mark: str = ""


@dataclass(frozen=True)
class Report:
    """Report on the candidates of one first stage.

    Attributes:
        candidates: the candidates.
        settings: settings against the full network, on all queries.
        baselines: baselines against the full network, the candidates' own order first.
        halves: the halves of the queries.
        choices: settings that the choosing half chooses; empty if a half is empty or has a quality of 0.
        calibrations: calibrations of the settings; empty without --calibrate.
        fusion: fused orders; None without --fusion.
    """

    candidates: Candidates
    settings: Sequence[SettingComparison]
    baselines: Sequence[BaselineComparison]
    halves: Halves
    choices: Sequence[Choice]
    calibrations: Sequence[SettingCalibration] = field(default=())
    fusion: FusionResult | None = None

    @classmethod
    def of(
        cls,
        candidates: Candidates,
        results: Sequence[Result],
        baselines: Sequence[Baseline],
        full: Setting,
        calibrations: Sequence[SettingCalibration] = (),
        fusion: FusionResult | None = None,
    ) -> Report:
        """Compare results and baselines with the full network, `full`."""
        halves = Halves.of(candidates.passages)
        settings, baseline_comparisons = compare(results, full, baselines)
        can_choose = halves.are_two and has_quality_in_both(results, full, halves)
        choices = choose_settings(results, full, halves) if can_choose else []
        return cls(candidates, settings, baseline_comparisons, halves, choices, calibrations, fusion)

    @property
    def title(self) -> str:
        """One line about the candidates."""
        passages = self.candidates.passages
        return f"{len(passages)} queries, {len(self.candidates)} pairs, {self.candidates.source}"

    def tables(self, chosen: Mapping[float, Setting]) -> list[Table]:
        """Return the tables of the report, in order.

        Args:
            chosen: setting that the model's own plan chooses for each budget.
        """
        choosing = f"{len(self.halves.choosing)} queries, drawn by the hashes of their ids"
        others = f"the {len(self.halves.held_out)} others"
        heading = "All queries; changes are against the full network, p-values with Holm's correction"
        tables = [Table(heading, settings_table(self.settings, self.baselines, chosen), SETTINGS)]
        if self.choices:
            heading = (
                f"Settings of a plan, chosen by {choosing}, relative to the full network, and held out on {others}"
            )
            tables.append(Table(heading, choice_table(self.choices)))
        if self.calibrations:
            heading = f"Errors of probabilities on {others}, of calibrations fitted to {choosing}"
            tables.append(Table(heading, calibration_table(self.calibrations)))
        if self.fusion is not None:
            heading = f"Fusion weights of the first stage, tried on {choosing}; {self.fusion.weight:g} is chosen"
            tables.append(Table(heading, weights_table(self.fusion)))
            heading = f"{QUALITY} of {others}, plain and fused at weight {self.fusion.weight:g}"
            tested = "Holm's correction has one family for the full network and one for all other settings"
            tables.append(Table(f"{heading}; {tested}", fusion_table(self.fusion), FUSED))
        if self.fusion is not None and self.fusion.orders:
            heading = f"{QUALITY} of {others} by one scorer and by several, with weights that the choosing half chose"
            changes = f"changes are against {self.fusion.full} + {FIRST_STAGE}, p-values have Holm's correction"
            tables.append(Table(f"{heading}; {changes}", orders_table(self.fusion), ORDERS))
        return tables

    def as_json(self) -> dict[str, Any]:
        """Return JSON values, without the values of single queries."""
        return {
            "queries": len(self.candidates.passages),
            "pairs": len(self.candidates),
            "candidates": self.candidates.source,
            "baselines": [item.as_json() for item in self.baselines],
            "settings": [item.as_json() for item in self.settings],
            "halves": {name: len(indices) for name, indices in asdict(self.halves).items()},
            "held_out": [item.as_json() for item in self.choices],
            "calibrated": [item.as_json() for item in self.calibrations],
            "fusion": None if self.fusion is None else self.fusion.as_json(),
        }


def first_stages_table(reports: Mapping[str, Report]) -> str:
    """Tabulate nDCG@10 of the same orders for several first stages.

    Args:
        reports: name of each first stage to its report.
    """
    (first, *_) = reports.values()
    rows = [[QUALITY, *reports]]
    for number, baseline in enumerate(first.baselines):
        orders = [mean(report.baselines[number].baseline.per_query[QUALITY]) for report in reports.values()]
        name = "as given" if number == 0 else baseline.baseline.name
        rows.append([name, *(f"{quality:.4f}" for quality in orders)])
    for number, item in enumerate(first.settings):
        results = [report.settings[number].result for report in reports.values()]
        rows.append([str(item.result.setting), *(f"{result.mean(QUALITY):.4f}" for result in results)])
    fusions = [report.fusion for report in reports.values() if report.fusion is not None]
    if fusions:
        rows.append(["fusion weight", *(f"{fusion.weight:g}" for fusion in fusions)])
    for items in zip(*(fusion.settings for fusion in fusions), strict=True):
        name = f"{items[0].result.setting}, fused"
        rows.append([name, *(f"{item.result.mean(QUALITY):.4f}" for item in items)])
    return markdown_table(rows)
