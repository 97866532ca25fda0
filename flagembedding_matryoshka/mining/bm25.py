"""BM25 over the texts of a corpus: English words, and bigrams in scripts without spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_array, csr_array
from tqdm import tqdm

QUERIES_AT_ONCE = 1024
"""Number of queries that BM25 searches for at a time."""
PAIRS_AT_ONCE = 2**16
"""Number of pairs that BM25 scores at a time."""
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # marks of repetition, and zero, in Han
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana of Ainu
    (0x3400, 0x9FFF),  # Han
    (0xAC00, 0xD7AF),  # Hangul
    (0xF900, 0xFAFF),  # Han for compatibility
    (0x20000, 0x3FFFF),  # rare Han
)
"""Code points of scripts that write words without spaces, and of Hangul, whose words carry particles."""
_LETTERS = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED)
_MARKS = "".join(
    chr(code)
    for first, last in UNSPACED[:5]
    for code in range(first, last + 1)
    if unicodedata.category(chr(code)).startswith("M")
)
_CHARACTER = rf"(?=\w)[{_LETTERS}][{_MARKS}]*"
CHARACTER = re.compile(_CHARACTER)
RUN = re.compile(f"(?:{_CHARACTER})+")
WORD = rf"[\w{_MARKS}]{{2,}}|{_CHARACTER}"
"""Words of at least two letters, as in bm25s, and single characters of scripts without spaces."""


def split_unspaced(text: str) -> str:
    """Return a text with each run of characters of an unspaced script replaced by its overlapping bigrams.

    This is Lucene's CJKBigramFilter, for more scripts. A run of one character stays as it is.
    """
    return text if text.isascii() else RUN.sub(_bigrams, text)


def _bigrams(run: re.Match[str]) -> str:
    characters = CHARACTER.findall(run[0])
    return f" {' '.join(map(''.join, pairwise(characters))) or characters[0]} "


class BM25:
    """An index of texts.

    Words are English ones, stemmed, without stop words. Scripts without spaces have bigrams.

    Args:
        texts: the corpus.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
        ValueError: if no text has a word to index.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            raise ImportError("BM25 needs bm25s and PyStemmer: pip install flagembedding_matryoshka[mining]") from error
        self._tokenize: Callable[..., Any] = partial(
            bm25s.tokenize,
            token_pattern=WORD,
            stopwords="en",
            stemmer=Stemmer.Stemmer("english"),
            show_progress=False,
        )
        self.index = bm25s.BM25()
        words = self._tokenize(list(map(split_unspaced, texts)))
        if not any(words.ids):
            raise ValueError(f"BM25 finds no word to index in {len(texts)} passages: they have only English stop words")
        self.index.index(words, show_progress=False)
        self.size = len(texts)
        self._rows: csr_array | None = None

    def words(self, queries: Sequence[str]) -> list[list[str]]:
        """Return the stemmed words of queries."""
        return self._tokenize(list(map(split_unspaced, queries)), return_ids=False)

    def lists(self, queries: Sequence[str], k: int) -> Iterator[dict[int, float]]:
        """Yield {index of a text: score} for each query: the first k texts, best first. All threads search.

        A text that shares no word with a query is left out.
        """
        for start in tqdm(range(0, len(queries), QUERIES_AT_ONCE), desc="BM25", unit="batch", disable=None):
            words = self.words(queries[start : start + QUERIES_AT_ONCE])
            indices, scores = self.index.retrieve(
                words, k=min(k, self.size), show_progress=False, n_threads=torch.get_num_threads()
            )
            for row, values in zip(indices.tolist(), scores.tolist(), strict=True):
                yield {index: value for index, value in zip(row, values, strict=True) if value > 0}

    def scores(self, query: str) -> np.ndarray:
        """Return the scores of all texts, float32 (texts,). A text that shares no word with the query has 0."""
        (words,) = self.words([query])
        return self.index.get_scores(words) if words else np.zeros(self.size, dtype=np.float32)

    def pair_scores(self, queries: Sequence[str], indices: Sequence[int]) -> np.ndarray:
        """Return the score of the text at `indices[i]` for `queries[i]`, float32 (pairs,), without those of others."""
        if self._rows is None:
            stored = self.index.scores
            columns = stored["data"], stored["indices"], stored["indptr"]
            self._rows = csc_array(columns, shape=(self.size, len(stored["indptr"]) - 1)).tocsr()
        distinct = {query: number for number, query in enumerate(dict.fromkeys(queries))}
        tokens = [self.index.get_tokens_ids(words) for words in self.words(list(distinct))]
        ends = np.cumsum([0, *map(len, tokens)])
        ids = np.array([token for row in tokens for token in row], dtype=np.int64)
        counts = csr_array((np.ones(len(ids), np.float32), ids, ends), shape=(len(tokens), self._rows.shape[1]))
        numbers = [distinct[query] for query in queries]
        chunks = (slice(start, start + PAIRS_AT_ONCE) for start in range(0, len(numbers), PAIRS_AT_ONCE))
        return np.concatenate(
            [self._rows[indices[chunk]].multiply(counts[numbers[chunk]]).sum(axis=1) for chunk in chunks]
        )
