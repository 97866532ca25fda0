"""Passages for queries that nobody has judged: what `--train_method self_distill` learns from.

python -m flagembedding_matryoshka.finetune.lists --data DIR --output lists.jsonl
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.finetune.hard_negatives import write_rows
from flagembedding_matryoshka.finetune.miners import Miner, add_miners, best_ranks, make_miners, vectors_path
from flagembedding_matryoshka.text.collections import read_texts
from flagembedding_matryoshka.text.output import remove_output

logger = logging.getLogger(__name__)
FEWEST = 2


def make_lists(
    passages: Sequence[str], queries: Sequence[str], top_k: int, miners: Sequence[Miner]
) -> Iterator[dict[str, Any]]:
    """`query` and `passages`, the first `top_k` of the miners' lists interleaved, for each query that has two or more.

    Passages of the same text are one, and the query's own text is none.

    Raises:
        ImportError: if BM25 is a miner and bm25s or PyStemmer is not installed.
        ValueError: if `top_k` is below 2, or no query has two passages.
    """
    if top_k < FEWEST:
        raise ValueError(f"top_k={top_k}: a list has at least {FEWEST} passages.")
    passages = list(dict.fromkeys(passages))
    dropped = 0
    # One more than is asked for, where the query itself is one of them.
    found = zip(*(miner(passages, queries, top_k + 1) for miner in miners), strict=True)
    for query, lists in zip(queries, found, strict=True):
        others = (passages[place] for place in best_ranks(lists) if passages[place] != query)
        chosen = list(islice(others, top_k))
        if len(chosen) < FEWEST:
            dropped += 1
            continue
        yield {"query": query, "passages": chosen}
    if dropped == len(queries):
        raise ValueError(f"no query finds {FEWEST} of {len(passages)} passages")
    if dropped:
        logger.warning("%d of %d queries are left out: they find fewer than %d passages", dropped, len(queries), FEWEST)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="corpus.jsonl and queries.jsonl lie here")
    parser.add_argument("--output", type=Path, required=True, help="the training file to write")
    parser.add_argument("--top_k", type=int, default=30, help="passages of a query, at most (default: %(default)s)")
    add_miners(parser)
    options = parser.parse_args(arguments)
    load_miners = make_miners(parser, options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    passages, queries = (list(read_texts(options.data / name).values()) for name in ("corpus.jsonl", "queries.jsonl"))
    count = write_rows(options.output, make_lists(passages, list(dict.fromkeys(queries)), options.top_k, load_miners()))
    remove_output(vectors_path(options.output))
    print(f"Wrote {count} rows to {options.output}.")


if __name__ == "__main__":
    main()
