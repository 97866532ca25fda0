"""What command lines that measure have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flagembedding_matryoshka.inference.arguments import stage


def add_candidates(group: argparse._ArgumentGroup) -> None:
    """What says which lists are ranked, but for `--data`."""
    group.add_argument("--split", default="test", help="qrels/{split}.tsv is read (default: %(default)s)")
    group.add_argument("--top_k", type=positive, default=100, help="candidates of a query (default: %(default)s)")
    group.add_argument(
        "--queries",
        type=positive,
        metavar="N",
        help="N judged queries, drawn at random, of a collection that has more (default: all)",
    )
    group.add_argument("--query_seed", type=int, default=0, help="which N are drawn (default: %(default)s)")


def add_scoring(group: argparse._ArgumentGroup) -> None:
    """How a re-ranker scores."""
    group.add_argument("--devices", nargs="+", help="such as cpu or cuda:0")
    group.add_argument("--batch_size", type=positive, default=128, help="default: %(default)s")
    group.add_argument("--query_max_length", type=positive, help="tokens of a query")
    group.add_argument("--max_length", type=positive, default=512, help="tokens of a pair (default: %(default)s)")


def add_dtype(group: argparse._ArgumentGroup) -> None:
    """What a re-ranker computes in."""
    group.add_argument("--dtype", default="auto", help="such as float32 or bfloat16 (default: %(default)s)")


def add_cascades(group: argparse._ArgumentGroup, required: bool = False) -> None:
    """Cascades, each a list of stages; `as_cascades` makes dicts of them."""
    group.add_argument(
        "--cascade",
        type=stage,
        nargs="+",
        action="append",
        required=required,
        default=None if required else [],
        metavar="EXIT:SHARE",
        help="after EXIT only this share of all candidates goes deeper, up to the deepest exit measured; give it again "
        "for another cascade",
    )


def as_cascades(parser: argparse.ArgumentParser, given: Sequence[Sequence[tuple[int, float]]]) -> list[dict]:
    """{exit: share} of each `--cascade`; exits the process where one names an exit twice."""
    for stages in given:
        if len(dict(stages)) < len(stages):
            parser.error(f"--cascade names an exit twice: {stages}")
    return [dict(stages) for stages in given]


def collection_name(directory: Path, split: str) -> str:
    """How reports call a collection."""
    return f"{directory.resolve().name}/{split}"


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value
