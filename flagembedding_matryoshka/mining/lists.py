"""Lists of passages for queries without judgements, for `--train_method self_distill`.

flagembedding-matryoshka lists --data DIR --output lists.jsonl
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.mining.retrievers import (
    Retriever,
    add_retrievers,
    best_ranks,
    make_retrievers,
    vectors_path,
)
from flagembedding_matryoshka.mining.rows import write_rows
from flagembedding_matryoshka.text.collections import read_texts
from flagembedding_matryoshka.text.output import remove_output

logger = logging.getLogger(__name__)
MIN_PASSAGES = 2


def make_lists(
    passages: Sequence[str], queries: Sequence[str], top_k: int, retrievers: Sequence[Retriever]
) -> Iterator[dict[str, Any]]:
    """Yield a row of `query` and `passages` for each query: the first `top_k` of the interleaved rankings.

    Passages with the same text count as one. A passage with the query's text is left out, and so is a query with fewer
    than two passages.

    Args:
        passages: texts of the corpus.
        queries: texts of the queries.
        top_k: largest number of passages in a list.
        retrievers: retrievers of the passages.

    Raises:
        ImportError: if BM25 is a retriever and bm25s or PyStemmer is not installed.
        ValueError: if `top_k` is below 2, or no query has two passages.
    """
    if top_k < MIN_PASSAGES:
        raise ValueError(f"top_k is {top_k}, but must be at least {MIN_PASSAGES}.")
    passages = list(dict.fromkeys(passages))
    left_out = 0
    # One more than `top_k`, because the query itself may be among them.
    found = zip(*(retrieve(passages, queries, top_k + 1) for retrieve in retrievers), strict=True)
    for query, lists in zip(queries, found, strict=True):
        others = (passages[index] for index in best_ranks(lists) if passages[index] != query)
        chosen = list(islice(others, top_k))
        if len(chosen) < MIN_PASSAGES:
            left_out += 1
            continue
        yield {"query": query, "passages": chosen}
    if left_out == len(queries):
        raise ValueError(f"no query finds {MIN_PASSAGES} of {len(passages)} passages")
    if left_out:
        logger.warning(
            "%d of %d queries are left out: they find fewer than %d passages", left_out, len(queries), MIN_PASSAGES
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: None is the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with corpus.jsonl and queries.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="the training file to write")
    parser.add_argument(
        "--top_k", type=int, default=30, help="largest number of passages of a query (default: %(default)s)"
    )
    add_retrievers(parser)
    options = parser.parse_args(arguments)
    load_retrievers = make_retrievers(parser, options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    passages, queries = (list(read_texts(options.data / name).values()) for name in ("corpus.jsonl", "queries.jsonl"))
    rows = make_lists(passages, list(dict.fromkeys(queries)), options.top_k, load_retrievers())
    count = write_rows(options.output, rows)
    remove_output(vectors_path(options.output))
    print(f"Wrote {count} rows to {options.output}.")


if __name__ == "__main__":
    main()
