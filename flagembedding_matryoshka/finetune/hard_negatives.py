"""Training data from a collection in BEIR layout, with the mistakes of BM25, a bi-encoder or both as negatives.

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

from flagembedding_matryoshka.files import replacing
from flagembedding_matryoshka.finetune.miners import Miner, add_miners, best_ranks, make_miners, vectors_path
from flagembedding_matryoshka.text.collections import Collection, bm25_lists, read_collection
from flagembedding_matryoshka.text.output import remove_output

logger = logging.getLogger(__name__)


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

    A relevant passage and the query itself, by their text, are no negatives. A relevant passage that is not in the
    corpus is left out, and so is a query without any other.

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
        relevant = list(dict.fromkeys(collection.passages[name] for name in grades if name in collection.passages))
        own = collection.passages[query] if collection.is_itself(query, query) else text
        hits = dict.fromkeys(texts[place] for place, rank in best_ranks(lists).items() if rank >= first)
        pool = [hit for hit in hits if hit not in (text, own, *relevant)]
        if not pool or not relevant:
            dropped += 1
            continue
        drawn = random.Random(f"{seed}-{query}").sample(pool, min(negatives, len(pool)))
        yield {"query": text, "pos": relevant, "neg": drawn}
    if dropped == len(collection.relevant):
        raise ValueError(f"there is no negative in ranks {first} to {last} of {len(texts)} passages for any query")
    if dropped:
        logger.warning(
            "%d queries are left out: no relevant passage, or no negative in ranks %d to %d", dropped, first, last
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
        "--first", type=int, default=2, help="rank from which they are drawn, the better of two (default: %(default)s)"
    )
    parser.add_argument("--last", type=int, default=100, help="rank up to which (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn (default: %(default)s)")
    add_miners(parser)
    options = parser.parse_args(arguments)
    load_miners = make_miners(parser, options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    collection = read_collection(options.data, options.split)
    rows = mine(collection, options.negatives, options.first, options.last, options.seed, load_miners())
    count = write_rows(options.output, rows)
    remove_output(vectors_path(options.output))
    print(f"Wrote {count} rows to {options.output}.")


if __name__ == "__main__":
    main()
