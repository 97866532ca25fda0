"""Training data from a collection in BEIR layout, with BM25's mistakes as negatives.

python -m flagembedding_matryoshka.finetune.hard_negatives --data DIR --output train.jsonl
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.beir import Collection, bm25_lists, read_collection
from flagembedding_matryoshka.files import replacing

logger = logging.getLogger(__name__)


def mine(collection: Collection, negatives: int, first: int, last: int, seed: int) -> Iterator[dict[str, Any]]:
    """FlagEmbedding's training rows, a query at a time in the order of the qrels.

    Args:
        negatives: how many are drawn, at most.
        first, last: the ranks of BM25's list, from 1, among which they are drawn: the very first passages are often
            relevant though nobody has said so.
        seed: of what is drawn; a query's draw depends on nothing else.

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
    found = bm25_lists(texts, [collection.queries[query] for query in collection.relevant], last)
    dropped = 0
    for (query, grades), places in zip(collection.relevant.items(), found, strict=True):
        text = collection.queries[query]
        relevant = list(dict.fromkeys(collection.passages[passage] for passage in grades))
        hits = dict.fromkeys(texts[place] for place in places[first - 1 :])
        pool = [hit for hit in hits if hit != text and hit not in relevant]
        if not pool:
            dropped += 1
            continue
        drawn = random.Random(f"{seed}-{query}").sample(pool, min(negatives, len(pool)))
        yield {"query": text, "pos": relevant, "neg": drawn}
    if dropped == len(collection.relevant):
        raise ValueError(f"BM25 finds no negative in ranks {first} to {last} of {len(texts)} passages for any query")
    if dropped:
        logger.warning(
            "%d queries are left out: BM25 finds no negative for them in ranks %d to %d", dropped, first, last
        )
    logger.info("%d passages, %d queries", len(texts), len(collection.relevant) - dropped)


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
        "--first", type=int, default=2, help="BM25 rank from which they are drawn (default: %(default)s)"
    )
    parser.add_argument("--last", type=int, default=100, help="BM25 rank up to which (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    collection = read_collection(options.data, options.split)
    count = write_rows(options.output, mine(collection, options.negatives, options.first, options.last, options.seed))
    print(f"Wrote {count} rows to {options.output}.")


if __name__ == "__main__":
    main()
