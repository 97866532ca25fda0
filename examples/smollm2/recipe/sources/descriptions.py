"""Debian's package descriptions: what a package is in a line, and at length."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from docstrings import Pair, normalise
from sources.texts import cut, is_english, seeded

DESCRIPTION = re.compile(r"^Description-en: (.*)\n((?: .*\n?)+)", re.MULTILINE)
SHARED = 3


def description(block: str) -> tuple[str, list[str]] | None:
    """The short description and the paragraphs of the long one."""
    match = DESCRIPTION.search(block)
    if match is None:
        return None
    paragraphs = re.split(r"^ \.\s*$", match[2], flags=re.MULTILINE)
    return match[1], [" ".join(paragraph.split()) for paragraph in paragraphs]


def package_pairs(seed: int, blocks: Iterable[str]) -> Iterator[Pair]:
    """Short and long descriptions; paragraphs that several packages share are left out of the long ones."""
    found = [parsed for block in blocks if (parsed := description(block))]
    shared = Counter(normalise(text) for _, paragraphs in found for text in set(paragraphs))
    for short, paragraphs in found:
        own = " ".join(text for text in paragraphs if text and shared[normalise(text)] < SHARED)
        passage = cut(own, seeded(seed, "packages", own)) if own else ""
        query = re.sub(r"\s+-\s+.*|\s*\((?:documentation|development|[^)]*files|[^)]*version)\)$", "", short)
        if len(query.split()) >= 3 and len(passage.split()) >= 15 and is_english(passage) and query.isascii():
            yield Pair(query, passage)
