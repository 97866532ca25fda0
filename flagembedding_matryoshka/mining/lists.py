"""Lists of passages for queries without judgements, for `--train_method self_distill`.

flagembedding-matryoshka lists --data DIR --output lists.jsonl

Rows are appended to OUTPUT.partial. If the command is stopped, the same command continues there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from flagembedding_matryoshka.mining.digests import digest_collection, digest_texts
from flagembedding_matryoshka.mining.resuming import Outcome, add_shard, write_outcomes
from flagembedding_matryoshka.mining.retrievers import Retriever, add_retrievers, best_ranks, choose_retrieval
from flagembedding_matryoshka.mining.rows import collapsed
from flagembedding_matryoshka.parser import Parser
from flagembedding_matryoshka.text.collections import judged_queries, read_instructions, read_texts

logger = logging.getLogger(__name__)
MIN_PASSAGES = 2
TEST_SPLIT = "test"
"""Split whose queries are kept out of the training data."""


def make_lists(
    passages: Sequence[str],
    queries: Sequence[str],
    top_k: int,
    retrievers: Sequence[Retriever],
    instructions: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Outcome]:
    """Yield the outcome of each query: a row of `query` and `passages`, the first `top_k` of the interleaved rankings.

    Passages with the same text count as one. An empty passage and one with the query's text are left out. A query that
    is empty, or has fewer than two passages, has no row.

    Args:
        passages: texts of the corpus.
        queries: texts of the queries.
        top_k: largest number of passages in a list.
        retrievers: retrievers of the passages.
        instructions: instructions that rows keep, by the query's text.

    Raises:
        ImportError: if BM25 is a retriever and bm25s or PyStemmer is not installed.
        ValueError: if `top_k` is below 2.
    """
    if top_k < MIN_PASSAGES:
        raise ValueError(f"top_k is {top_k}, but must be at least {MIN_PASSAGES}.")
    passages = list(dict.fromkeys(text for text in passages if text.strip()))
    # One more than `top_k`, because the query itself may be among them.
    found = zip(*(retrieve(passages, queries, top_k + 1) for retrieve in retrievers), strict=True)
    for query, lists in zip(queries, found, strict=True):
        others = (passages[index] for index in best_ranks(lists) if collapsed(passages[index]) != collapsed(query))
        chosen = list(islice(others, top_k))
        if not query.strip():
            yield Outcome(None, Counter({"empty queries": 1}))
        elif len(chosen) < MIN_PASSAGES:
            yield Outcome(None, Counter({f"queries that find fewer than {MIN_PASSAGES} passages": 1}))
        else:
            instruction = {"instruction": instructions[query]} if query in instructions else {}
            yield Outcome({"query": query, "passages": chosen, **instruction}, Counter())


def read_queries(directory: Path, split: str | None = None, include_test: bool = False) -> list[str]:
    """Return the distinct texts of the queries to train on, in the order of `queries.jsonl`.

    Queries of `qrels/test.tsv` are left out if the file exists, and so are queries with the text of one of them.

    Args:
        directory: a collection in BEIR layout.
        split: take the queries of `qrels/{split}.tsv` alone; None takes all queries. "test" includes the test queries.
        include_test: also take the queries of `qrels/test.tsv`.

    Raises:
        FileNotFoundError: if the judgements of `split` do not exist.
        ValueError: naming file and line of a malformed row, or if no query is left.
    """
    queries = read_texts(directory / "queries.jsonl")
    chosen = set(queries)
    if split is not None:
        chosen &= judged_queries(directory, split)
    test_path = directory / "qrels" / f"{TEST_SPLIT}.tsv"
    excluded: set[str] = set()
    if split != TEST_SPLIT and not include_test and test_path.is_file():
        excluded = {queries[name] for name in judged_queries(directory, TEST_SPLIT) if name in queries}
    found = dict.fromkeys(text for name, text in queries.items() if name in chosen)
    kept = [text for text in found if text not in excluded]
    if not kept:
        source = "queries.jsonl" if split is None else f"qrels/{split}.tsv"
        raise ValueError(
            f"{directory}: no query is left. {source} has {len(found)} queries, and {len(found) - len(kept)} of them "
            f"are in qrels/{TEST_SPLIT}.tsv. --include_test takes test queries too."
        )
    if len(kept) < len(found):
        logger.info("%d of %d queries are left out: they are in %s", len(found) - len(kept), len(found), test_path)
    return kept


def instructions_by_text(path: Path) -> dict[str, str]:
    """Return the instruction of each query of `queries.jsonl` that has one, by the query's text.

    Raises:
        ValueError: if queries with the same text have different instructions: a list is of one of them.
    """
    texts = read_texts(path)
    found: dict[str, str] = {}
    for name, instruction in read_instructions(path).items():
        if found.setdefault(texts[name], instruction) != instruction:
            raise ValueError(
                f"{path}: the query {texts[name]!r:.80} has two instructions, {found[texts[name]]!r} and "
                f"{instruction!r}, but lists are made once for each text: give it one."
            )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: None is the process's own.
    """
    parser = Parser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory with corpus.jsonl and queries.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="the training file to write")
    parser.add_argument(
        "--top_k", type=int, default=30, help="largest number of passages of a query (default: %(default)s)"
    )
    parser.add_argument(
        "--split", help="take the queries of qrels/SPLIT.tsv alone (default: all queries but those of qrels/test.tsv)"
    )
    parser.add_argument(
        "--include_test", action="store_true", help="also take the queries of qrels/test.tsv, which measure the model"
    )
    add_shard(parser, "queries")
    add_retrievers(parser)
    options = parser.parse_args(arguments)
    retrieval = choose_retrieval(parser, options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    taken = read_queries(options.data, options.split, options.include_test)
    queries = [taken[place] for place in options.shard.places(len(taken))]
    passages = list(read_texts(options.data / "corpus.jsonl").values())
    instructions = instructions_by_text(options.data / "queries.jsonl")

    def outcomes(done: int) -> Iterator[Outcome]:
        return make_lists(passages, queries[done:], options.top_k, retrieval.load(), instructions)

    conditions = {
        "command": "lists",
        "data": digest_collection(options.data),
        "queries": digest_texts(queries),
        "shard": str(options.shard),
        "top_k": options.top_k,
        **retrieval.conditions(),
    }
    count = write_outcomes(options.output, conditions, len(queries), outcomes)
    retrieval.finish()
    print(f"Wrote {count} rows to {options.output}.")


if __name__ == "__main__":
    main()
