"""Matryoshka re-rankers: rank and score files, inspect, train, evaluate, serve. `COMMAND --help` explains a command.

commands:
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

PACKAGE = "flagembedding_matryoshka"
COMMANDS = {
    "rank": ("cli.rank", "order the documents of each query of a file"),
    "score": ("cli.score", "score the pairs of a file"),
    "finetune": ("finetune.__main__", "train a model"),
    "mine": ("mining.negatives", "make training data of a collection, with hard negatives"),
    "lists": ("mining.lists", "make lists for training without labels"),
    "teach": ("mining.scores", "add a teacher's scores to training data"),
    "evaluate": ("evaluation.__main__", "measure quality and cost of depths, widths and cascades"),
    "inspect": ("cli.inspect", "show what a checkpoint says of itself"),
    "export": ("cli.export", "write some exits as a smaller checkpoint"),
    "serve": ("serve.__main__", "answer over HTTP"),
}
"""Name to the module whose `main` it is, and what it does."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flagembedding-matryoshka",
        usage="%(prog)s COMMAND …",
        description=f"{__doc__}" + "\n".join(f"  {name:10}{about}" for name, (_, about) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version(PACKAGE))
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of these")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="the command's own")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line. Nothing is imported but what the command needs."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    # As if the command were a program of its own, so that its help and its errors call it by its name.
    sys.argv = [f"{parser.prog} {options.command}", *options.arguments]
    import_module(f"{PACKAGE}.{COMMANDS[options.command][0]}").main()
