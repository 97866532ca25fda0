"""What finds passages for queries: BM25, a bi-encoder or both."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from flagembedding_matryoshka.finetune.bi_encoder import BiEncoder
from flagembedding_matryoshka.text.collections import bm25_lists

ENCODER_OPTIONS = ("batch_size", "max_length", "device", "use_fp16", "use_bf16", "trust_remote_code")
# Of (texts, queries, k): for each query places of at most k texts, best first.
Miner = Callable[[Sequence[str], Sequence[str], int], Iterable[Sequence[int]]]


def best_ranks(lists: Sequence[Sequence[int]]) -> dict[int, int]:
    """What is in any of the lists with its best rank, from 1: the lists interleaved, without what comes again."""
    ranks: dict[int, int] = {}
    for rank, places in enumerate(zip_longest(*lists), start=1):
        for place in places:
            if place is not None:
                ranks.setdefault(place, rank)
    return ranks


def vectors_path(output: Path) -> Path:
    """Return the path of the stored vectors of a command, which exist until its output is complete."""
    return output.with_name(f"{output.name}.vectors")


def add_miners(parser: argparse.ArgumentParser) -> None:
    """Add the options of the miners."""
    parser.add_argument("--miner", choices=["bm25", "bi_encoder", "both"], default="bm25", help="whose ranks")
    parser.add_argument("--bi_encoder", help="name or path of a sentence-transformers model")
    encoder = parser.add_argument_group("of the bi-encoder", argument_default=argparse.SUPPRESS)
    encoder.add_argument("--batch_size", type=int, help="texts at once (default: 64)")
    encoder.add_argument("--max_length", type=int, help="tokens of a text (default: the model's own limit)")
    encoder.add_argument("--device", help="such as cpu or cuda:0; default: what sentence-transformers chooses")
    encoder.add_argument("--use_fp16", action="store_true", help="encode in half precision, for GPUs")
    encoder.add_argument("--use_bf16", action="store_true", help="encode in bfloat16, for what computes it fast")
    encoder.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def make_miners(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Callable[[], list[Miner]]:
    """Return a function that loads the chosen miners.

    Contradicting options end the program here, before data is read. A bi-encoder's vectors are stored at
    `vectors_path(options.output)`.
    """
    given = {name: value for name, value in vars(options).items() if name in ENCODER_OPTIONS}
    if options.miner != "bm25" and options.bi_encoder is None:
        parser.error(f"--miner {options.miner} needs --bi_encoder")
    if options.miner == "bm25" and (given or options.bi_encoder is not None):
        parser.error(f"--{next(iter(given), 'bi_encoder')} is for --miner bi_encoder or both")

    def load() -> list[Miner]:
        miners: list[Miner] = [] if options.miner == "bi_encoder" else [bm25_lists]
        if options.miner != "bm25":
            miners.append(BiEncoder(options.bi_encoder, **given, stored=vectors_path(options.output)).lists)
        return miners

    return load
