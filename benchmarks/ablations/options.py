"""Options that several claims have."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.ablations.training import SET_HERE
from flagembedding_matryoshka.evaluation.arguments import add_candidates, add_scoring, as_cascades, positive


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every claim has: collections, how a re-ranker scores, and where results go."""
    data = parser.add_argument_group("what is ranked")
    data.add_argument("--data", type=Path, nargs="+", required=True, help="collections in BEIR's layout")
    add_candidates(data)
    add_scoring(parser.add_argument_group("how it is scored"))
    output = parser.add_argument_group("where it goes")
    output.add_argument(
        "--output", type=Path, default=Path("docs/ablations"), help="for the tables (default: %(default)s)"
    )
    output.add_argument(
        "--work",
        type=Path,
        default=Path("ablation_work"),
        help="for trained models and what was measured (default: %(default)s)",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """What is trained on, how long, and from which seeds."""
    training = parser.add_argument_group("what is trained", "all other arguments of fine-tuning: behind --")
    training.add_argument("--train_data", nargs="+", required=True, help="training files, or directories of them")
    training.add_argument("--steps", type=positive, required=True, help="of each training")
    training.add_argument("--seeds", type=int, nargs="+", required=True, help="a training for each")


def add_timing(parser: argparse.ArgumentParser) -> None:
    """How much is timed."""
    parser.add_argument(
        "--timed_pairs", type=positive, default=1000, help="for the speed, of each collection (default: %(default)s)"
    )


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit the process where options contradict each other; make dicts of cascades."""
    names = [path.resolve().name for path in options.data]
    if len(set(names)) < len(names):
        parser.error(f"--data: the collections {names} need names that differ")
    if "cascade" in options:
        options.cascade = as_cascades(parser, options.cascade)
    if "seeds" not in options:
        if options.training_arguments:
            parser.error(f"{options.claim} trains nothing: leave out -- {' '.join(options.training_arguments)}")
        return
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds {options.seeds} name one twice")
    own = [word for word in options.training_arguments if word.partition("=")[0] in SET_HERE]
    if own:
        parser.error(f"{own} behind -- are what this command sets itself: it sets {', '.join(SET_HERE)}")
