"""Training data from a collection in BEIR layout, with hard negatives from BM25, a bi-encoder or both.

flagembedding-matryoshka mine --data DIR --output train.jsonl
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.mining.retrievers import (
    Retriever,
    add_retrievers,
    best_ranks,
    bm25_lists,
    make_retrievers,
    vectors_path,
)
from flagembedding_matryoshka.mining.rows import write_rows
from flagembedding_matryoshka.parser import Parser
from flagembedding_matryoshka.text.collections import Collection, read_collection
from flagembedding_matryoshka.text.output import remove_output

logger = logging.getLogger(__name__)


def mine(
    collection: Collection,
    negatives: int,
    first: int,
    last: int,
    seed: int,
    retrievers: Sequence[Retriever] = (bm25_lists,),
) -> Iterator[dict[str, Any]]:
    """Yield a training row in FlagEmbedding's format for each query, in the order of the qrels.

    Relevant passages, the query itself and passages with the same text as one of them are no negatives. A relevant
    passage that is not in the corpus is left out. A query is left out if no relevant passage or no negative remains.

    Args:
        collection: passages, queries and judgements.
        negatives: largest number of negatives of a query.
        first, last: ranks, from 1, among which negatives are drawn. The best ranks are often relevant passages without
            a judgement. If several retrievers find a passage, its best rank counts.
        seed: seed of the draws. The draw of a query depends on the seed and the query's id.
        retrievers: retrievers of the passages.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
        ValueError: if `negatives`, `first` or `last` is out of range, or no query has a negative.
    """
    if negatives < 1 or not 1 <= first <= last:
        raise ValueError(
            f"negatives={negatives}, first={first}, last={last}: negatives must be at least 1, and "
            "1 <= first <= last must hold."
        )
    texts = list(collection.passages.values())
    queries = [collection.queries[query] for query in collection.relevant]
    found = zip(*(retrieve(texts, queries, last) for retrieve in retrievers), strict=True)
    left_out = 0
    for (query, grades), lists in zip(collection.relevant.items(), found, strict=True):
        text = collection.queries[query]
        relevant = list(dict.fromkeys(collection.passages[name] for name in grades if name in collection.passages))
        own = collection.passages[query] if collection.is_itself(query, query) else text
        hits = dict.fromkeys(texts[index] for index, rank in best_ranks(lists).items() if rank >= first)
        pool = [hit for hit in hits if hit not in (text, own, *relevant)]
        if not pool or not relevant:
            left_out += 1
            continue
        drawn = random.Random(f"{seed}-{query}").sample(pool, min(negatives, len(pool)))
        yield {"query": text, "pos": relevant, "neg": drawn}
    if left_out == len(collection.relevant):
        raise ValueError(f"no query has a negative in ranks {first} to {last} of {len(texts)} passages")
    if left_out:
        logger.warning(
            "%d queries are left out: no relevant passage, or no negative in ranks %d to %d", left_out, first, last
        )
    logger.info("%d passages, %d queries", len(texts), len(collection.relevant) - left_out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: None is the process's own.
    """
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with corpus.jsonl, queries.jsonl and qrels/"
    )
    parser.add_argument("--output", type=Path, required=True, help="the training file to write")
    parser.add_argument("--split", default="train", help="the judgements are qrels/{split}.tsv (default: %(default)s)")
    parser.add_argument(
        "--negatives", type=int, default=15, help="largest number of negatives of a query (default: %(default)s)"
    )
    parser.add_argument(
        "--first", type=int, default=2, help="best rank of a negative, in the better ranking (default: %(default)s)"
    )
    parser.add_argument("--last", type=int, default=100, help="worst rank of a negative (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the draws (default: %(default)s)")
    add_retrievers(parser)
    options = parser.parse_args(arguments)
    load_retrievers = make_retrievers(parser, options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    collection = read_collection(options.data, options.split)
    rows = mine(collection, options.negatives, options.first, options.last, options.seed, load_retrievers())
    count = write_rows(options.output, rows)
    remove_output(vectors_path(options.output))
    print(f"Wrote {count} rows to {options.output}.")


if __name__ == "__main__":
    main()
