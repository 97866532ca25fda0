"""Does it help an exit to learn from a teacher's scores, and from deeper exits?

The same base, rows, steps and seeds, trained by three methods; every exit of what comes out ranks the same candidates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.ablations.options import add_training
from benchmarks.ablations.ranking import Collections, load, measure, quality
from benchmarks.ablations.report import Report, about_machine
from benchmarks.ablations.statistics import Arm
from benchmarks.ablations.training import about_training, train
from flagembedding_matryoshka.evaluation.arguments import add_dtype
from flagembedding_matryoshka.evaluation.measure import grid
from flagembedding_matryoshka.setting import Setting

LABELS, TEACHER, DEEPER = METHODS = ("normal", "distill_final_layer_teacher", "distill_fix_layer_teacher")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this claim."""
    parser.add_argument("--base", required=True, help="what is trained: a checkpoint's name or path, or a GGUF file")
    add_dtype(parser)
    add_training(parser)


def run(options: argparse.Namespace, collections: Collections) -> None:
    """Train, measure, report."""
    folder = options.work / "distillation"
    found = {}
    for seed in options.seeds:
        for method in METHODS:
            name = f"{method}_seed{seed}"
            trained = train(options, options.base, folder / "models" / name, seed, ["--train_method", method])
            with load(options, str(trained), dtype=options.dtype) as reranker:
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
        title="Does an exit gain by learning from a teacher's scores, and from deeper exits?",
        compared="Exit by exit, models that learnt from labels alone are compared with models that learnt from the "
        "same rows, as long and from the same seeds, of the teacher scores in the data too, and of these and the "
        "scores of deeper exits (self-distillation).",
        reading={
            "method": f"{LABELS} learns from labels alone, {TEACHER} at every exit also from the teacher scores in the "
            f"data, {DEEPER} moreover from deeper exits.",
            "compared with": "the method that change and p are against, at the same exit.",
        },
        about=about_training(options, options.base) | machine,
    ).write(options.output, collections, arms)
