"""What documentation is made of: headings and the prose under them."""

import re
from dataclasses import dataclass, field

from sources.texts import plain

NUMBERING = re.compile(
    r"^(?:(?:Chapter|Appendix|Section)\s+)?(?:[A-Z]\.|[A-Z]?\d+(?:\.\d+)*\.?|[A-Z](?:\.\d+)+\.?)\s+|^(?:§|Q:)\s*"
)
QUESTION = re.compile(
    r"^(?:what|how|why|when|where|who|which|can|do|does|did|is|are|should|will|isn't|aren't|don't|doesn't|wasn't)\b",
    re.IGNORECASE,
)


@dataclass
class Section:
    """A heading, the heading above it and the paragraphs up to the next heading."""

    title: str
    parent: str = ""
    paragraphs: list[str] = field(default_factory=list)


def heading(text: str) -> str:
    """A heading without its number and the sign that links to it, and not in capitals only."""
    title = NUMBERING.sub("", plain(text)).strip(" :.-")
    return title.capitalize() if title.isupper() and " " in title else title


def is_question(title: str) -> bool:
    """Whether a heading is a question that stands alone."""
    return QUESTION.match(title) is not None and len(title.split()) >= 4


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is a sentence or more and not a menu, a signature or a line of code."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return len(paragraph.split()) >= 8 and paragraph[-1] in ".!?:)\"'" and letters > 0.85 * len(paragraph)
