"""Training data from a collection in BEIR layout, with the mistakes of BM25, a bi-encoder or both as negatives.

python -m flagembedding_matryoshka.finetune.hard_negatives --data DIR --output train.jsonl
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.files import replacing
from flagembedding_matryoshka.finetune.bi_encoder import BiEncoder
from flagembedding_matryoshka.text.collections import Collection, bm25_lists, read_collection

logger = logging.getLogger(__name__)

ENCODER_OPTIONS = ("batch_size", "max_length", "device", "use_fp16", "use_bf16", "trust_remote_code")
# Of (texts, queries, k): for each query places of at most k texts, best first.
Miner = Callable[[Sequence[str], Sequence[str], int], Iterable[Sequence[int]]]


def mine(
    collection: Collection, negatives: int, first: int, last: int, seed: int, miners: Sequence[Miner] = (bm25_lists,)
) -> Iterator[dict[str, Any]]:
    """FlagEmbedding's training rows, a query at a time in the order of the qrels.

    Args:
        negatives: how many are drawn, at most.
        first, last: the ranks of a miner's list, from 1, among which they are drawn: the very first passages are often
            relevant though nobody has said so. The best rank in any miner's list counts.
        seed: of what is drawn; a query's draw depends on nothing else.
        miners: what finds candidates.

    A relevant passage and the query itself, by their text, are no negatives.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
        ValueError: if `negatives` or the ranks leave nothing to draw, or no query has a negative.
    """
    if negatives < 1 or not 1 <= first <= last:
        raise ValueError(
            f"negatives={negatives} of ranks {first} to {last}: at least one of ranks from 1 up is wanted."
        )
    texts = list(collection.passages.values())
    queries = [collection.queries[query] for query in collection.relevant]
    found = zip(*(miner(texts, queries, last) for miner in miners), strict=True)
    dropped = 0
    for (query, grades), lists in zip(collection.relevant.items(), found, strict=True):
        text = collection.queries[query]
        relevant = list(dict.fromkeys(collection.passages[passage] for passage in grades))
        hits = dict.fromkeys(texts[place] for place, rank in best_ranks(lists).items() if rank >= first)
        pool = [hit for hit in hits if hit != text and hit not in relevant]
        if not pool:
            dropped += 1
            continue
        drawn = random.Random(f"{seed}-{query}").sample(pool, min(negatives, len(pool)))
        yield {"query": text, "pos": relevant, "neg": drawn}
    if dropped == len(collection.relevant):
        raise ValueError(f"there is no negative in ranks {first} to {last} of {len(texts)} passages for any query")
    if dropped:
        logger.warning("%d queries are left out: there is no negative in ranks %d to %d", dropped, first, last)
    logger.info("%d passages, %d queries", len(texts), len(collection.relevant) - dropped)


def best_ranks(lists: Sequence[Sequence[int]]) -> dict[int, int]:
    """What is in any of the lists with its best rank, from 1: the lists interleaved, without what comes again."""
    ranks: dict[int, int] = {}
    for rank, places in enumerate(zip_longest(*lists), start=1):
        for place in places:
            if place is not None:
                ranks.setdefault(place, rank)
    return ranks


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write JSON Lines, all of them or no file, and return how many; the directory is made where it is missing.

    Raises:
        IsADirectoryError: if `path` is one.
    """
    count = 0
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="corpus.jsonl, queries.jsonl and qrels/ lie here")
    parser.add_argument("--output", type=Path, required=True, help="the training file to write")
    parser.add_argument("--split", default="train", help="qrels/{split}.tsv is read (default: %(default)s)")
    parser.add_argument("--negatives", type=int, default=15, help="for each query, at most (default: %(default)s)")
    parser.add_argument(
        "--first", type=int, default=2, help="rank from which they are drawn, the better of two (default: %(default)s)"
    )
    parser.add_argument("--last", type=int, default=100, help="rank up to which (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--miner", choices=["bm25", "bi_encoder", "both"], default="bm25", help="whose ranks")
    parser.add_argument("--bi_encoder", help="name or path of a sentence-transformers model")
    encoder = parser.add_argument_group("of the bi-encoder", argument_default=argparse.SUPPRESS)
    encoder.add_argument("--batch_size", type=int, help="texts at once (default: 64)")
    encoder.add_argument("--max_length", type=int, help="tokens of a text (default: the model's own limit)")
    encoder.add_argument("--device", help="such as cpu or cuda:0; default: what sentence-transformers chooses")
    encoder.add_argument("--use_fp16", action="store_true", help="encode in half precision, for GPUs")
    encoder.add_argument("--use_bf16", action="store_true", help="encode in bfloat16, for what computes it fast")
    encoder.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    options = parser.parse_args(arguments)
    given = {name: value for name, value in vars(options).items() if name in ENCODER_OPTIONS}
    if options.miner != "bm25" and options.bi_encoder is None:
        parser.error(f"--miner {options.miner} needs --bi_encoder")
    if options.miner == "bm25" and (given or options.bi_encoder is not None):
        parser.error(f"--{next(iter(given), 'bi_encoder')} is for --miner bi_encoder or both")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    collection = read_collection(options.data, options.split)
    miners: list[Miner] = [] if options.miner == "bi_encoder" else [bm25_lists]
    if options.miner != "bm25":
        miners.append(BiEncoder(options.bi_encoder, **given).lists)
    rows = mine(collection, options.negatives, options.first, options.last, options.seed, miners)
    count = write_rows(options.output, rows)
    print(f"Wrote {count} rows to {options.output}.")


if __name__ == "__main__":
    main()
