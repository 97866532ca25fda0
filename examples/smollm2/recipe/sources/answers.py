"""Pairs of a question and a passage with its answer: medical questions, and questions on sections of Wikipedia."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from docstrings import Pair
from sources.abstracts import shortened
from sources.texts import is_english, plain, seeded

MIN_WORDS = 12


def medical_pairs(seed: int, rows: Iterable[Mapping[str, str]]) -> Iterator[Pair]:
    """Yield a pair of each question and its answer.

    The collection also has other answers on the same disease, and answers to the same question on other diseases.
    Mining finds negatives among them.

    Args:
        seed: seed of all draws.
        rows: with the fields id, question and answer.
    """
    for row in rows:
        question, answer = plain(row["question"]).replace(" ?", "?"), plain(row["answer"])
        if len(answer.split()) >= MIN_WORDS and is_english(answer):
            yield Pair(question, shortened(answer, seeded(seed, "medical", row["id"])))


def section_question_pairs(seed: int, rows: Iterable[Mapping[str, Any]]) -> Iterator[Pair]:
    """Yield a pair of each question and the section with its answer. A passage is never cut before the answer's end.

    Args:
        seed: seed of all draws.
        rows: with the fields question, article, sentences and answers (indices of sentences).
    """
    for row in rows:
        if not row["answers"]:
            continue
        last, rng = max(row["answers"]), seeded(seed, "section", row["question"])
        kept = [plain(sentence) for sentence in row["sentences"][: max(last + 1, rng.randint(3, 12))]]
        passage = " ".join(kept)
        if MIN_WORDS <= len(passage.split()) <= 300:
            headed = rng.random() < 0.5
            yield Pair(plain(row["question"]), f"{row['article']}. {passage}" if headed else passage)
