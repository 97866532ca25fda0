"""Training data from a collection in BEIR layout, with BM25's mistakes as negatives.

python -m flagembedding_matryoshka.finetune.hard_negatives --data DIR --output train.jsonl
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)
BATCH = 1024
QRELS_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class Collection:
    """A BEIR collection.

    Attributes:
        passages: id to "title text".
        queries: id to text.
        positives: query id to the ids of its relevant passages, those of score above 0, in the order of the qrels.
    """

    passages: dict[str, str]
    queries: dict[str, str]
    positives: dict[str, list[str]]


def read_collection(directory: Path, split: str) -> Collection:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/{split}.tsv`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming file and line of what is malformed or unknown, or if no query has a relevant passage.
    """
    corpus, topics, qrels = (directory / name for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv"))
    for path in (corpus, topics, qrels):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: BEIR's layout is corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv")
    passages, queries = _read_texts(corpus), _read_texts(topics)
    positives: dict[str, list[str]] = {}
    with qrels.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip("\n").split("\t")
            if number == 1 and cells != QRELS_HEADER:
                raise ValueError(f"{qrels}, line 1: the header must be {QRELS_HEADER}, separated by tabs, got {cells}")
            if number == 1 or not line.strip():
                continue
            if len(cells) != 3 or not cells[2].removeprefix("-").isdecimal():
                raise ValueError(
                    f"{qrels}, line {number}: query-id, corpus-id and a whole score are wanted, got {cells}"
                )
            query, passage, score = cells
            if int(score) <= 0:
                continue
            for kind, value, known in (("query", query, queries), ("passage", passage, passages)):
                if value not in known:
                    raise ValueError(f"{qrels}, line {number}: there is no {kind} {value!r}")
            positives.setdefault(query, []).append(passage)
    if not positives:
        raise ValueError(f"{qrels} names no relevant passage: no score is above 0")
    return Collection(passages, queries, positives)


def _read_texts(path: Path) -> dict[str, str]:
    """Title and text by id; queries have no title."""
    texts: dict[str, str] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("_id", "text")):
                raise ValueError(f"{path}, line {number}: an object with the strings _id and text is wanted")
            if not isinstance(row.get("title"), str | None):
                raise ValueError(f"{path}, line {number}: title must be a string, got {row['title']!r}")
            if row["_id"] in texts:
                raise ValueError(f"{path}, line {number}: _id {row['_id']!r} is there twice")
            texts[row["_id"]] = f"{row.get('title') or ''} {row['text']}".strip()
    return texts


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
    found = _bm25_lists(texts, [collection.queries[query] for query in collection.positives], min(last, len(texts)))
    dropped = 0
    for (query, positives), places in zip(collection.positives.items(), found, strict=True):
        text = collection.queries[query]
        relevant = list(dict.fromkeys(collection.passages[passage] for passage in positives))
        hits = dict.fromkeys(texts[place] for place in places[first - 1 :])
        pool = [hit for hit in hits if hit != text and hit not in relevant]
        if not pool:
            dropped += 1
            continue
        drawn = random.Random(f"{seed}-{query}").sample(pool, min(negatives, len(pool)))
        yield {"query": text, "pos": relevant, "neg": drawn}
    if dropped == len(collection.positives):
        raise ValueError(f"BM25 finds no negative in ranks {first} to {last} of {len(texts)} passages for any query")
    if dropped:
        logger.warning(
            "%d queries are left out: BM25 finds no negative for them in ranks %d to %d", dropped, first, last
        )
    logger.info("%d passages, %d queries", len(texts), len(collection.positives) - dropped)


def _bm25_lists(texts: Sequence[str], queries: Sequence[str], k: int) -> Iterator[Sequence[int]]:
    """For each query the places of BM25's first k texts, those that share no word with it left out."""
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise ImportError("mining needs bm25s and PyStemmer: pip install flagembedding_matryoshka[mining]") from error
    stemmer, index = Stemmer.Stemmer("english"), bm25s.BM25()

    def tokenize(batch: Sequence[str]) -> Any:
        return bm25s.tokenize(batch, stopwords="en", stemmer=stemmer, show_progress=False)

    index.index(tokenize(texts), show_progress=False)
    for start in tqdm(range(0, len(queries), BATCH), desc="mining", unit="batch", disable=None):
        places, scores = index.retrieve(tokenize(queries[start : start + BATCH]), k=k, show_progress=False)
        for row, values in zip(places, scores, strict=True):
            yield [int(place) for place, value in zip(row, values, strict=True) if value > 0]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write JSON Lines, all of them or no file, and return how many; the directory is made where it is missing.

    Raises:
        IsADirectoryError: if `path` is one.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, count = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
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
