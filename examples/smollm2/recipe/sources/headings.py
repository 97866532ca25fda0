"""Headings of documentation and the text under them."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from docstrings import Pair
from sources.sections import Section, is_question
from sources.texts import cut, is_english, seeded

GENERIC = re.compile(
    r"^(?:description|name|options|notes|synopsis|examples?|details|introduction|overview|usage|features|footnotes)$",
    re.IGNORECASE,
)


def query_for(section: Section, often: bool, draw: float) -> str | None:
    """A heading as somebody would ask for it, with the heading above where it alone says too little."""
    title, parent = section.title, re.sub(r"\(\d\w*\) Manual Page$", "", section.parent)
    if is_question(title):
        return title
    alone = len(title.split()) >= 3 and not often
    if alone and draw < 0.6:
        return title
    if not parent or GENERIC.match(parent) or parent.endswith("?"):
        return title if alone else None
    form = int(draw * 1000) % 4
    return (
        f"{parent}: {title}",
        f"{title} ({parent})",
        f"{parent} {title.lower() if title[1:].islower() else title}",
        f"{title} in {parent}",
    )[form]


def section_pairs(seed: int, sections: Sequence[Section]) -> Iterator[Pair]:
    """A pair for each section whose beginning is prose."""
    titles = Counter(section.title.lower() for section in sections)
    for section in sections:
        rng = seeded(seed, "sections", section.parent, section.title, section.paragraphs[0])
        query = query_for(section, titles[section.title.lower()] > 1, rng.random())
        passage = cut(" ".join(section.paragraphs[:6]), rng)
        if query is None or not 2 <= len(query.split()) <= 20 or len(passage.split()) < 15:
            continue
        if not is_english(passage) or not re.search("[a-z]{3}", query) or not query.isascii():
            continue
        if section.parent and rng.random() < 0.15:
            passage = f"{section.parent}{'' if section.parent.endswith('?') else '.'} {passage}"
        yield Pair(query, passage)
