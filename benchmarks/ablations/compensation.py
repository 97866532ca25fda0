"""Does a token adapter compensate for the cost of compression?

A model is measured at full width, and at a ratio without and with a token adapter that was trained on top of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.ablations.options import add_training
from benchmarks.ablations.ranking import Collections, load, measure, quality
from benchmarks.ablations.report import Report, about_machine
from benchmarks.ablations.statistics import Arm
from benchmarks.ablations.training import about_training, train
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.evaluation.measure import grid
from flagembedding_matryoshka.inference.arguments import add_options
from flagembedding_matryoshka.setting import Setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this comparison."""
    parser.add_argument("--model", required=True, help="a layer-wise checkpoint, or what fine-tuning wrote")
    parser.add_argument("--ratio", type=int, choices=[2, 4, 8], default=2, help="default: %(default)s")
    parser.add_argument(
        "--compress_layers", type=int, nargs="+", required=True, help="layers after which it compresses"
    )
    add_options(parser, ["dtype"])
    add_training(parser)


def run(options: argparse.Namespace, collections: Collections) -> None:
    """Train, measure and write the report."""
    config = inspect_checkpoint(options.model, from_raw=False).config
    settings = grid(config, None, options.compress_layers, [options.ratio])
    compressed = [setting for setting in settings if setting.compress_ratio > 1]
    folder = options.work / "compensation"
    with load(options, options.model) as reranker:
        alone = measure(reranker, collections, settings, folder / "scores" / "without")
        machine = about_machine(reranker)
    width = ["--compress_ratios", str(options.ratio), "--compress_layers", *map(str, options.compress_layers)]
    found = []
    for seed in options.seeds:
        name = f"ratio{options.ratio}_seed{seed}"
        adapter = train(options, options.model, folder / "models" / name, seed, ["--finetune_type", "token", *width])
        with load(options, options.model, peft_path=[str(adapter)]) as reranker:
            found.append(measure(reranker, collections, compressed, folder / "scores" / name))

    def arms(scope: Sequence[str]) -> list[Arm]:
        rows = []
        for setting in compressed:
            exit_name, ratio = str(setting.depth), f"ratio {setting.compress_ratio}"
            full = alone[Setting(setting.cutoff_layers)]
            without = Arm({"exit": exit_name, "width": f"{ratio}, no adapter"}, [quality(alone[setting], scope)])
            values = [quality(measured[setting], scope) for measured in found]
            rows += [
                without,
                Arm({"exit": exit_name, "width": f"{ratio}, token adapter"}, values, without),
                Arm({"exit": exit_name, "width": "full"}, [quality(full, scope)], without),
            ]
        return rows

    after = " and ".join(map(str, compressed[0].compress_layers))
    Report(
        name="compensation",
        title="Does a token adapter compensate for the cost of compression?",
        compared=f"The model merges {options.ratio} passage tokens into one after layer {after}. At each exit it is "
        "compared with two others: the same model with a token adapter that was trained on top of it for "
        f"{options.steps} steps, and the model at full width.",
        reading={},
        about=about_training(options, options.model) | machine,
    ).write(options.output, collections, arms)
