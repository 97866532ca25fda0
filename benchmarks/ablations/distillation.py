"""Does an exit gain from a teacher's scores and from deeper exits?

A base is trained by three methods on the same rows, with the same steps and seeds. All exits rank the same candidates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.ablations.options import add_training
from benchmarks.ablations.ranking import Collections, load, measure, quality
from benchmarks.ablations.report import Report, about_machine
from benchmarks.ablations.statistics import Arm
from benchmarks.ablations.training import about_training, train
from flagembedding_matryoshka.evaluation.measure import grid
from flagembedding_matryoshka.inference.arguments import add_options
from flagembedding_matryoshka.setting import Setting

LABELS, TEACHER, DEEPER = METHODS = ("normal", "distill_final_layer_teacher", "distill_fix_layer_teacher")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this comparison."""
    parser.add_argument("--base", required=True, help="the model to train: a checkpoint's name or path, or a GGUF file")
    add_options(parser, ["dtype"])
    add_training(parser)


def run(options: argparse.Namespace, collections: Collections) -> None:
    """Train, measure and write the report."""
    folder = options.work / "distillation"
    found = {}
    for seed in options.seeds:
        for method in METHODS:
            name = f"{method}_seed{seed}"
            trained = train(options, options.base, folder / "models" / name, seed, ["--train_method", method])
            with load(options, str(trained)) as reranker:
                settings = grid(reranker.config)
                found[method, seed] = measure(reranker, collections, settings, folder / "scores" / name)
                machine = about_machine(reranker)

    def arms(scope: Sequence[str]) -> list[Arm]:
        rows = []
        for setting in settings:

            def arm(method: str, against: Arm | None = None, layer: int = setting.depth) -> Arm:
                values = [quality(found[method, seed][Setting((layer,))], scope) for seed in options.seeds]
                than = "" if against is None else against.names["method"]
                return Arm({"exit": str(layer), "method": method, "compared with": than}, values, against)

            labels = arm(LABELS)
            teacher = arm(TEACHER, labels)
            rows += [labels, teacher, arm(DEEPER, labels), arm(DEEPER, teacher)]
        return rows

    Report(
        name="distillation",
        title="Does an exit gain from a teacher's scores and from deeper exits?",
        compared="Three ways to train are compared at each exit, on the same rows, with the same number of steps and "
        "the same seeds: from labels alone, from labels and the data's teacher scores, and from these and the "
        "scores of deeper exits (self-distillation).",
        reading={
            "method": f"with {LABELS} every exit learns from labels alone, with {TEACHER} also from the data's teacher "
            f"scores, with {DEEPER} from both and from deeper exits.",
            "compared with": "the reference method of change and p, at the same exit.",
        },
        about=about_training(options, options.base) | machine,
    ).write(options.output, collections, arms)
