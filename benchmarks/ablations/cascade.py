"""How much of the full ranking remains if most candidates stop early?

Cascades of a model are compared with its full depth for all candidates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablations.agreement import agreement
from benchmarks.ablations.ranking import Collections, load, measure, quality
from benchmarks.ablations.report import Report, about_machine
from benchmarks.ablations.statistics import Arm
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.evaluation.arguments import add_cascades
from flagembedding_matryoshka.evaluation.measure import full_network
from flagembedding_matryoshka.inference.arguments import add_options
from flagembedding_matryoshka.setting import Setting

AGREEMENT = ("first the same", "first ten in common")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this comparison."""
    parser.add_argument("--model", required=True, help="a layer-wise checkpoint, or what fine-tuning wrote")
    add_options(parser, ["dtype"])
    add_cascades(parser, required=True)


def run(options: argparse.Namespace, collections: Collections) -> None:
    """Measure and write the report."""
    config = inspect_checkpoint(options.model, from_raw=False).config
    full = full_network(config)
    cascades = [Setting(full.cutoff_layers, cascade=tuple(stages.items())) for stages in options.cascade]
    for setting in cascades:
        setting.check(config)
    with load(options, options.model) as reranker:
        settings = [full, *dict.fromkeys(cascades)]
        found = measure(reranker, collections, settings, options.work / "cascade")
        machine = about_machine(reranker)

    def operations(setting: Setting, scope: Sequence[str]) -> float:
        return sum(found[setting][name].result.flops_per_pair * len(collections[name]) for name in scope)

    def arms(scope: Sequence[str]) -> list[Arm]:
        rows = []
        for setting, ranked in found.items():
            further = {column: agreement(column, ranked, found[full], scope) for column in AGREEMENT}
            further["operations"] = operations(setting, scope) / operations(full, scope)
            names = {"candidates go on": str(setting)}
            rows.append(Arm(names, [quality(ranked, scope)], rows[0] if rows else None, further))
        return rows

    Report(
        name="cascade",
        title="How much of the full ranking remains if most candidates stop early?",
        compared="In a cascade some candidates stop at an exit. After exit 9 of `9:0.3`, 30 % of all candidates go "
        "deeper; the others rank after them. The reference runs all candidates through all layers.",
        reading={
            "first the same": "fraction of queries whose first candidate is that of the full ranking.",
            "first ten in common": "fraction of a query's first ten candidates that are among the full ranking's first "
            "ten.",
            "operations": "floating-point operations relative to the full ranking.",
        },
        about={"model": Path(options.model).name} | machine,
    ).write(options.output, collections, arms)
