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
    "store": ("cli.store", "compute the states of passages, to rank them by their ids"),
    "finetune": ("finetune.__main__", "train a model"),
    "mine": ("mining.negatives", "make training data of a collection, with hard negatives"),
    "lists": ("mining.lists", "make lists for training without labels"),
    "teach": ("mining.scores", "add a teacher's scores to training data"),
    "evaluate": ("evaluation.__main__", "measure quality and cost of depths, widths and cascades"),
    "inspect": ("cli.inspect", "show a checkpoint's architecture, exits, template and other facts"),
    "export": ("cli.export", "write some exits as a smaller checkpoint"),
    "serve": ("serve.__main__", "answer over HTTP"),
}
"""Each command with the module of its `main` and its help."""
INTERRUPTED = 130
"""The exit code of shells for a process that SIGINT ends."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flagembedding-matryoshka",
        usage="%(prog)s COMMAND …",
        description=f"{__doc__}" + "\n".join(f"  {name:10}{about}" for name, (_, about) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version(PACKAGE))
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="a command of the list above")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="options of the command")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line. Only the modules of the command are imported.

    A wrong input or option ends the process with one line and exit code 1, Ctrl-C with one line and exit code 130.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    # The command's help and errors then call it by this name.
    name = f"{parser.prog} {options.command}"
    sys.argv = [name, *options.arguments]
    try:
        import_module(f"{PACKAGE}.{COMMANDS[options.command][0]}").main()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if not _is_for_users(error):
            raise
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None


def _is_for_users(error: Exception) -> bool:
    """Return whether the message of an error is enough.

    It is for errors of files and of missing packages, and for wrong values that this package refuses. An error that
    another package raises may be a bug here, and keeps its traceback.
    """
    if isinstance(error, OSError | ImportError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, TypeError | ValueError) and raised_in.split(".")[0] == PACKAGE
