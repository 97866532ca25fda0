"""Test a claim, and write its tables in Markdown and in JSON.

python -m benchmarks.ablations precision --model DIR --data COLLECTION COLLECTION --output docs/ablations

Arguments after `--` are arguments of the fine-tuning command. If a command is stopped, the same command resumes:
trainings and measurements in `--work` are not repeated.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from benchmarks.ablations import cascade, compensation, distillation, precision
from benchmarks.ablations.options import add_common, check
from benchmarks.ablations.ranking import read_candidates

CLAIMS = {
    "distillation": distillation,
    "compensation": compensation,
    "precision": precision,
    "cascade": cascade,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    claims = parser.add_subparsers(dest="claim", required=True)
    for name, claim in CLAIMS.items():
        summary = claim.__doc__.partition("\n")[0]
        command = claims.add_parser(name, help=summary, description=summary)
        claim.add_arguments(command)
        add_common(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, passed = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = build_parser()
    options = parser.parse_args(own)
    options.training_arguments = passed
    check(parser, options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    CLAIMS[options.claim].run(options, read_candidates(options))


if __name__ == "__main__":
    main()
