"""Options of several comparisons."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.ablations.training import SET_HERE
from flagembedding_matryoshka.evaluation.arguments import add_candidates, as_cascades, positive
from flagembedding_matryoshka.inference.arguments import add_options

SCORING = ("devices", "batch_size", "query_max_length", "max_length")
"""Options of `MatryoshkaReranker` that every comparison has."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every comparison: collections, scoring and output."""
    data = parser.add_argument_group("candidates")
    data.add_argument("--data", type=Path, nargs="+", required=True, help="collections in BEIR's layout")
    add_candidates(data)
    add_options(parser.add_argument_group("scoring"), SCORING)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, default=Path("docs/ablations"), help="directory of the tables (default: %(default)s)"
    )
    output.add_argument(
        "--work",
        type=Path,
        default=Path("ablation_work"),
        help="directory of trained models and measurements (default: %(default)s)",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of the trainings."""
    training = parser.add_argument_group("training", "other arguments of fine-tuning come after --")
    training.add_argument("--train_data", nargs="+", required=True, help="training files, or directories of them")
    training.add_argument("--steps", type=positive, required=True, help="steps of each training")
    training.add_argument("--seeds", type=int, nargs="+", required=True, help="seeds, one for each training")


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Add the option of the timed sample."""
    parser.add_argument(
        "--timed_pairs",
        type=positive,
        default=1000,
        help="pairs of each collection whose time is measured (default: %(default)s)",
    )


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the process if options contradict each other. Cascades become dicts."""
    names = [path.resolve().name for path in options.data]
    if len(set(names)) < len(names):
        parser.error(f"--data: the collections {names} need different names")
    if "cascade" in options:
        options.cascade = as_cascades(parser, options.cascade)
    if "seeds" not in options:
        if options.training_arguments:
            parser.error(f"{options.claim} trains nothing: leave out -- {' '.join(options.training_arguments)}")
        return
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds {options.seeds} has a seed twice")
    own = [word for word in options.training_arguments if word.partition("=")[0] in SET_HERE]
    if own:
        parser.error(f"{own} after -- are set by this command, which sets {', '.join(SET_HERE)}")
