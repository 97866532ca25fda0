"""What every kind of text needs: words, sentences, passages of varied length, and whether a text is English prose."""

import random
import re

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about above after again against all also am an and any are as at be because been before being below
        between both but by can cannot could did do does doing down during each either else etc even ever every few
        for from further had has have having he her here hers him his how however i if in into is it its itself just
        least less like many may me might more most much must my neither no nor not now of off on once one only onto
        or other our out over own per rather same shall she should since so some such than that the their them then
        there these they this those though through thus to together too two under until up upon us use used uses
        using very via was we were what when where whether which while who whom whose why will with within without
        would yet you your
        """,
    )
)
TYPOGRAPHY = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": " - ", "–": "-", "¶": " ", "\uf0c1": " "})
ABBREVIATED = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|al|Mr|Mrs|Dr|St|No|Fig|fig|approx|resp|pp?|ed|vol|[A-Z])\.)$")
BOUNDARY = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")


def seeded(*parts: object) -> random.Random:
    """A generator that depends on nothing but these: a text is treated alike whatever else is collected."""
    return random.Random("\x1f".join(map(str, parts)))


def plain(text: str) -> str:
    """A text on one line, with quotation marks and dashes as a keyboard has them."""
    return " ".join(text.translate(TYPOGRAPHY).split())


def words_of(text: str) -> list[str]:
    """The words of a text, with the hyphens, dots and apostrophes inside them."""
    return re.findall(r"[A-Za-z0-9]+(?:[-'.+_][A-Za-z0-9]+)*", text)


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph; an abbreviation's full stop ends none."""
    found, start = [], 0
    for match in BOUNDARY.finditer(text):
        if not ABBREVIATED.search(text[: match.start()][-12:]):
            found.append(text[start : match.end()].strip())
            start = match.end()
    return [sentence for sentence in [*found, text[start:].strip()] if sentence]


def cut(text: str, rng: random.Random, most: int | None = None) -> str:
    """The beginning of a text: 30 to 120 words, now and then up to 200, cut after a sentence where that is possible."""
    limit = most or (rng.randint(120, 200) if rng.random() < 0.07 else rng.randint(30, 120))
    kept, count = [], 0
    for sentence in sentences(text):
        count += len(sentence.split())
        if kept and count > limit:
            break
        kept.append(sentence)
    return " ".join(" ".join(kept).split()[: limit + 20])


def is_english(text: str) -> bool:
    """Whether a text is mostly ASCII letters and, where it is long enough to tell, has English function words."""
    words = text.lower().split()
    letters = sum(character.isascii() and (character.isalpha() or character == " ") for character in text)
    if not words or letters < 0.85 * len(text) or sum(not c.isascii() for c in text) > 0.02 * len(text):
        return False
    return len(words) < 15 or sum(word in STOP_WORDS for word in words) > 0.2 * len(words)
