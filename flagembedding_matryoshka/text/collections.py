"""Collections in BEIR layout (arXiv 2104.08663), and BM25's candidates and scores for their queries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flagembedding_matryoshka.text.lines import good_lines, good_rows

logger = logging.getLogger(__name__)

BATCH = 1024
QRELS_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class Collection:
    """A BEIR collection.

    Attributes:
        passages: id to "title text".
        queries: id to text.
        relevant: query id to {passage id: grade above 0}, in the order of the qrels, without queries that have no
            relevant passage. May name passages that are not in the corpus. They lower recall and nDCG, because no run
            can contain them.
    """

    passages: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, int]]

    def is_itself(self, query: str, passage: str) -> bool:
        """Return whether a passage is the query itself, as in ArguAna: same id and text, and not judged relevant.

        An equal id may be chance.
        """
        is_relevant = passage in self.relevant.get(query, ())
        return passage == query and not is_relevant and self.queries[query] in self.passages.get(passage, "")


def read_collection(directory: Path, split: str) -> Collection:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/{split}.tsv`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming file and line of a malformed row or an unknown query, or if no passage is relevant.
    """
    corpus, topics, qrels = (directory / name for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv"))
    for path in (corpus, topics, qrels):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: BEIR's layout is corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv")
    passages, queries = read_texts(corpus), read_texts(topics)
    relevant: dict[str, dict[str, int]] = {}
    for number, query, passage, score in _read_judgements(qrels):
        if score <= 0:
            continue
        if query not in queries:
            raise ValueError(f"{qrels}, line {number}: {topics.name} has no query {query!r}")
        grade = relevant.setdefault(query, {}).setdefault(passage, score)
        if grade != score:
            raise ValueError(f"{qrels}, line {number}: {passage!r} has grade {score} for {query!r}, and {grade} above")
    judged = {passage: None for grades in relevant.values() for passage in grades}
    if missing := [passage for passage in judged if passage not in passages]:
        logger.warning(
            "%s: %d of %d relevant passages are not in the corpus, such as %r; they count as not found",
            *(qrels, len(missing), len(judged), missing[0]),
        )
    if not relevant:
        raise ValueError(f"{qrels} has no relevant passage: no score is above 0")
    return Collection(passages, queries, relevant)


def read_texts(path: Path) -> dict[str, str]:
    """Read `corpus.jsonl` or `queries.jsonl`, whose rows have no title. Return "title text" by id.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: naming file and line of a malformed row.
    """
    texts: dict[str, str] = {}

    def fault(row: dict[str, Any]) -> str | None:
        if not all(isinstance(row.get(name), str) for name in ("_id", "text")):
            return "a row must have the strings _id and text"
        if not isinstance(row.get("title"), str | None):
            return f"title must be a string, got {row['title']!r:.80}"
        if row["_id"] in texts:
            return f"the _id {row['_id']!r} occurs twice"
        return None

    for row in good_rows(path, fault):
        texts[row["_id"]] = f"{row.get('title') or ''} {row['text']}".strip()
    return texts


def _read_judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Yield line, query, passage and grade."""
    for number, line in good_lines(path):
        cells = line.rstrip("\r\n").split("\t")
        if number == 1 and cells != QRELS_HEADER:
            raise ValueError(f"{path}, line 1: the header must be {QRELS_HEADER}, separated by tabs, got {cells}")
        if number == 1:
            continue
        if len(cells) != 3 or not cells[2].removeprefix("-").isdecimal():
            raise ValueError(f"{path}, line {number}: a row must be query-id, corpus-id and an int score, got {cells}")
        yield number, cells[0], cells[1], int(cells[2])


def bm25_lists(texts: Sequence[str], queries: Sequence[str], k: int) -> Iterator[Sequence[int]]:
    """For each query the places of BM25's first k texts, those that share no word with it left out.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
        ValueError: if no text has a word to index.
    """
    return map(list, bm25_scored_lists(texts, queries, k))


def bm25_scored_lists(texts: Sequence[str], queries: Sequence[str], k: int) -> Iterator[dict[int, float]]:
    """Yield {index of a text: BM25's score} for each query, best first, as `bm25_lists`."""
    index, tokenize = _bm25(texts)
    for start in tqdm(range(0, len(queries), BATCH), desc="BM25", unit="batch", disable=None):
        places, scores = index.retrieve(
            tokenize(queries[start : start + BATCH]), k=min(k, len(texts)), show_progress=False
        )
        for row, values in zip(places.tolist(), scores.tolist(), strict=True):
            yield {place: value for place, value in zip(row, values, strict=True) if value > 0}


def bm25_scorer(texts: Sequence[str]) -> Callable[[str], np.ndarray]:
    """What gives BM25's scores, float32 (texts,), for a query; 0 is that of a text that shares no word with it.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
        ValueError: if no text has a word to index.
    """
    index, tokenize = _bm25(texts)

    def scores(query: str) -> np.ndarray:
        (words,) = tokenize([query], return_ids=False)
        return index.get_scores(words) if words else np.zeros(len(texts), dtype=np.float32)

    return scores


def _bm25(texts: Sequence[str]) -> tuple[Any, Callable[..., Any]]:
    """The index and its tokenizer of texts."""
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise ImportError("BM25 needs bm25s and PyStemmer: pip install flagembedding_matryoshka[mining]") from error
    stemmer, index = Stemmer.Stemmer("english"), bm25s.BM25()
    tokenize = partial(bm25s.tokenize, stopwords="en", stemmer=stemmer, show_progress=False)
    words = tokenize(texts)
    if not any(words.ids):
        raise ValueError(f"BM25 finds no word to index in {len(texts)} passages: they hold English stop words at most")
    index.index(words, show_progress=False)
    return index, tokenize
