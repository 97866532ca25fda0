"""Words and what dictionaries say of them."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from docstrings import Pair
from sources.debian import fetch, members
from sources.dictd import Entry, entries, gloss
from sources.texts import cut, is_english, seeded

DICTIONARIES = {
    "dict-gcide": 5000,
    "dict-wn": 5000,
    "dict-foldoc": 4000,
    "dict-jargon": 1500,
    "dict-devil": 600,
    "dict-elements": 100,
}
MIN_WORDS = 12


def dictionary(package: str, cache: Path) -> list[Entry]:
    """The entries of a dictionary's package."""
    deb = fetch(package, cache)
    if deb is None:
        return []
    files = {Path(name).suffix: content for name, content in members(deb, r"\.(?:index|dict\.dz)$")}
    return list(entries(files[".index"], files[".dz"]))


def about_word(word: str, rng: random.Random) -> str:
    """How somebody asks what a word means."""
    article = "an" if word[0].lower() in "aeiou" else "a"
    thing = word if word[0].isupper() or word.endswith("s") or " " in word else f"{article} {word}"
    forms = "{0}|{0}|what is {1}?|What is {0}?|define {0}|{0} meaning|meaning of {0}|what does {0} mean?|{0} definition"
    forms += "|What is the meaning of {0}?|definition of the word {0}|explain {0}|what does it mean when people say {0}"
    return rng.choice(forms.split("|")).format(word, thing)


def about_meaning(text: str, rng: random.Random) -> str | None:
    """How somebody asks for the word when they know what it means, or for the person who did something."""
    clause = re.split(r"[;:(.]|, (?:as|such as|and|or|usually)\b", text)[0].strip(" ,")
    if not 5 <= len(clause.split()) <= 18:
        return None
    if match := re.match(r"[\w, -]+? (who [a-z]+ed\b.*)", clause):
        return f"{match[1]}?"
    if clause.startswith("To "):
        return rng.choice(["verb that means {}", "word for: {}", "which verb means {}?"]).format(
            clause[0].lower() + clause[1:]
        )
    if re.match(r"(?:an?|the|any|one) ", clause, re.IGNORECASE):
        clause = clause[0].lower() + clause[1:]
        return rng.choice(["what do you call {}?", "word for {}", "{}", "What is the name of {}?"]).format(clause)
    return None


def is_headword(word: str) -> bool:
    """Whether people would look it up: letters, not a suffix or a bare number."""
    return re.fullmatch(r"[A-Za-z][A-Za-z' -]{2,40}", word) is not None and len(word.split()) <= 4


def gloss_pairs(seed: int, cache: Path) -> Iterator[Pair]:
    """A sample of each dictionary; a word that several explain is taken from the first of them only."""
    taken = set()
    for package, most in DICTIONARIES.items():
        found = sorted(dictionary(package, cache), key=lambda entry: seeded(seed, package, entry.headword).random())
        kept = 0
        for entry in found:
            word = entry.headword.lower() if package == "dict-gcide" else entry.headword
            rng = seeded(seed, "glosses", entry.headword)
            if kept == most or word.lower() in taken or not is_headword(word):
                continue
            text = cut(gloss(entry.text), rng)
            if len(text.split()) < MIN_WORDS or not is_english(text) or re.search(r"[\[\]\\]", text):
                continue
            taken.add(word.lower())
            kept += 1
            query = about_meaning(text, rng) if rng.random() < 0.3 else None
            form = rng.random()
            if query is None and form < 0.3:
                written = text
            else:
                written = f"{word}: {text}" if form < 0.7 else f"{word[0].upper()}{word[1:]}. {text}"
            yield Pair(query or about_word(word, rng), written)
