"""What do fewer bits cost, and what do they save?

One model in several formats, on the same candidates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations.agreement import agreement
from benchmarks.ablations.options import add_timing
from benchmarks.ablations.ranking import Collections, load, measure, quality
from benchmarks.ablations.report import Report, about_machine
from benchmarks.ablations.statistics import Arm
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.evaluation.measure import full_network
from flagembedding_matryoshka.setting import Setting

REFERENCE = "float32"
PRECISIONS: dict[str, dict[str, Any]] = {
    REFERENCE: {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "nf4": {"dtype": "float32", "quantization": "nf4"},
}
AGREEMENT = ("Kendall's tau", "first ten in common")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this comparison."""
    parser.add_argument("--model", required=True, help="a layer-wise checkpoint, or what fine-tuning wrote")
    parser.add_argument("--cutoff_layers", type=int, nargs="+", help="exits to measure (default: the deepest)")
    others = [name for name in PRECISIONS if name != REFERENCE]
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=others,
        default=others,
        help=f"compared with {REFERENCE}; int8 runs on a CPU alone (default: all)",
    )
    add_timing(parser)


def run(options: argparse.Namespace, collections: Collections) -> None:
    """Measure and write the report."""
    config = inspect_checkpoint(options.model, from_raw=False).config
    settings = [Setting((layer,)) for layer in options.cutoff_layers or full_network(config).cutoff_layers]
    for setting in settings:
        setting.check(config)
    found = {}
    for name in (REFERENCE, *options.precisions):
        with load(options, options.model, **PRECISIONS[name]) as reranker:
            folder = options.work / "precision" / name
            found[name] = measure(reranker, collections, settings, folder, options.timed_pairs)
            machine = about_machine(reranker)
    del machine["dtype"]  # each row has its own

    def speed(name: str, setting: Setting, scope: Sequence[str]) -> float:
        seconds = [len(collections[data]) / found[name][setting][data].result.pairs_per_second for data in scope]
        return sum(len(collections[data]) for data in scope) / sum(seconds)

    def arms(scope: Sequence[str]) -> list[Arm]:
        rows = []
        for setting in settings:
            full = found[REFERENCE][setting]
            reference = None
            for name, measured in found.items():
                further = {column: agreement(column, measured[setting], full, scope) for column in AGREEMENT}
                further["pairs/s"] = speed(name, setting, scope)
                names = {"exit": str(setting.depth), "weights": name}
                rows.append(Arm(names, [quality(measured[setting], scope)], reference, further))
                reference = reference or rows[-1]
        return rows

    Report(
        name="precision",
        title="What do fewer bits cost, and what do they save?",
        compared="The same model ranks the same candidates with its weights in each format, and is compared with "
        f"itself in {REFERENCE}. With int8 and nf4 all other computations are in float32.",
        reading={
            "Kendall's tau": f"agreement of the whole order with that of {REFERENCE}: 1 is the same order, 0 is "
            "chance.",
            "first ten in common": "fraction of a query's first ten candidates that are among the first ten of "
            f"{REFERENCE}.",
            "pairs/s": f"pairs of query and passage per second, measured on {options.timed_pairs} pairs of each "
            "collection.",
        },
        about={"model": Path(options.model).name} | machine,
    ).write(options.output, collections, arms)
