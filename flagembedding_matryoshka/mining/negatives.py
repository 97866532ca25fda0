"""Training data from a collection in BEIR layout, with hard negatives from BM25, a bi-encoder or both.

flagembedding-matryoshka mine --data DIR --output train.jsonl

Rows are appended to OUTPUT.partial. If the command is stopped, the same command continues there.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.mining.digests import digest_collection
from flagembedding_matryoshka.mining.resuming import Outcome, add_shard, write_outcomes
from flagembedding_matryoshka.mining.retrievers import (
    Retriever,
    add_retrievers,
    best_ranks,
    bm25_lists,
    choose_retrieval,
)
from flagembedding_matryoshka.mining.rows import collapsed, usable_passages
from flagembedding_matryoshka.parser import Parser
from flagembedding_matryoshka.text.collections import Collection, read_collection


def mine(
    collection: Collection,
    queries: Sequence[str],
    negatives: int,
    first: int,
    last: int,
    seed: int,
    retrievers: Sequence[Retriever] = (bm25_lists,),
) -> Iterator[Outcome]:
    """Yield the outcome of each query: a training row in FlagEmbedding's format, or none.

    Passages with a grade of 0 or less are negatives first. The others are drawn from the retrievers' ranks. Relevant
    passages, the query itself, empty passages and passages with the text of one of them are no negatives. A relevant
    passage that is empty, the query itself, or not in the corpus is left out. A query has no row if it is empty, or if
    no relevant passage or no negative remains. A row keeps the query's instruction.

    Args:
        collection: passages, queries and judgements.
        queries: ids of judged queries.
        negatives: largest number of negatives of a query.
        first, last: ranks, from 1, among which negatives are drawn. The best ranks are often relevant passages without
            a judgement. If several retrievers find a passage, its best rank counts.
        seed: seed of the draws. The draw of a query depends on the seed and the query's id.
        retrievers: retrievers of the passages.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
        ValueError: if `negatives`, `first` or `last` is out of range.
    """
    if negatives < 1 or not 1 <= first <= last:
        raise ValueError(
            f"negatives={negatives}, first={first}, last={last}: negatives must be at least 1, and "
            "1 <= first <= last must hold."
        )
    texts, questions = list(collection.passages.values()), [collection.queries[query] for query in queries]
    found = zip(*(retrieve(texts, questions, last) for retrieve in retrievers), strict=True)
    for query, lists in zip(queries, found, strict=True):
        hits = [texts[index] for index, rank in best_ranks(lists).items() if rank >= first]
        yield _outcome(collection, query, hits, negatives, random.Random(f"{seed}-{query}"))


def _outcome(collection: Collection, query: str, hits: Sequence[str], negatives: int, draw: random.Random) -> Outcome:
    """Return the outcome of a query.

    Args:
        hits: texts that its negatives are drawn from.
        negatives: largest number of negatives.
        draw: source of the draws.
    """
    text = collection.queries[query]
    if not text.strip():
        return Outcome(None, Counter({"empty queries": 1}))
    relevant = _texts_of(collection, collection.relevant[query])
    irrelevant = _texts_of(collection, collection.irrelevant.get(query, ()))
    kept, left_out = usable_passages(text, relevant)
    positives = [relevant[index] for index in kept]
    own = collection.passages[query] if collection.is_itself(query, query) else text
    certain_kept, certain_left_out = usable_passages(text, irrelevant, relevant)
    certain = [irrelevant[index] for index in certain_kept if irrelevant[index] != own]
    left_out += certain_left_out
    if not positives:
        return Outcome(None, left_out + Counter({"queries without a relevant passage": 1}))
    if len(certain) > negatives:
        certain = draw.sample(certain, negatives)
    judged = {"", *map(collapsed, (text, own, *relevant, *irrelevant))}
    pool = [hit for hit in dict.fromkeys(hits) if collapsed(hit) not in judged]
    drawn = draw.sample(pool, min(negatives - len(certain), len(pool)))
    if not certain and not drawn:
        return Outcome(None, left_out + Counter({"queries without a negative": 1}))
    instruction = {"instruction": collection.instructions[query]} if query in collection.instructions else {}
    return Outcome({"query": text, "pos": positives, "neg": [*certain, *drawn], **instruction}, left_out)


def _texts_of(collection: Collection, passages: Iterable[str]) -> list[str]:
    """Return the distinct texts of the passages that are in the corpus."""
    return list(dict.fromkeys(collection.passages[name] for name in passages if name in collection.passages))


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
    add_shard(parser, "queries")
    add_retrievers(parser)
    options = parser.parse_args(arguments)
    retrieval = choose_retrieval(parser, options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    collection = read_collection(options.data, options.split)
    judged = list(collection.relevant)
    queries = [judged[place] for place in options.shard.places(len(judged))]
    draws = {name: getattr(options, name) for name in ("negatives", "first", "last", "seed")}

    def outcomes(done: int) -> Iterator[Outcome]:
        return mine(collection, queries[done:], **draws, retrievers=retrieval.load())

    conditions: dict[str, Any] = {
        "command": "mine",
        "data": digest_collection(options.data, options.split),
        "shard": str(options.shard),
        **draws,
        **retrieval.conditions(),
    }
    count = write_outcomes(options.output, conditions, len(queries), outcomes)
    retrieval.finish()
    print(f"Wrote {count} rows to {options.output}.")


if __name__ == "__main__":
    main()
