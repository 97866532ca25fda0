"""Random texts to score."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

QUERY_WORDS, PASSAGE_WORDS = (5, 15), (5, 150)
WORD_START = "Ġ"


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words that are a single token, of ASCII letters alone."""
    tokens = tokenizer.get_vocab()
    return [token[1:] for token in tokens if token[0] == WORD_START and token[1:].isascii() and token[1:].isalpha()]


def random_pairs(words: Sequence[str], count: int, draw: random.Random) -> list[tuple[str, str]]:
    """Queries with a passage each."""
    queries = random_texts(words, count, QUERY_WORDS, draw)
    return list(zip(queries, random_texts(words, count, PASSAGE_WORDS, draw), strict=True))


def random_lists(words: Sequence[str], queries: int, candidates: int, draw: random.Random) -> dict[str, list[str]]:
    """Queries with several passages each."""
    return {
        query: random_texts(words, candidates, PASSAGE_WORDS, draw)
        for query in random_texts(words, queries, QUERY_WORDS, draw)
    }


def random_texts(words: Sequence[str], count: int, lengths: tuple[int, int], draw: random.Random) -> list[str]:
    return [" ".join(draw.choices(words, k=draw.randint(*lengths))) for _ in range(count)]
