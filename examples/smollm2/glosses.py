"""Words and what dictionaries say of them."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from debian import fetch, members
from dictd import Entry, entries, gloss
from docstrings import Pair
from texts import cut, is_english, seeded

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


def question(word: str, rng: random.Random) -> str:
    """How somebody asks what a word means."""
    article = "an" if word[0].lower() in "aeiou" else "a"
    plural_or_name = word[0].isupper() or word.endswith("s") or " " in word
    forms = [word, word, f"what is {word}?" if plural_or_name else f"what is {article} {word}?", f"What is {word}?"]
    forms += [
        f"define {word}",
        f"{word} meaning",
        f"meaning of {word}",
        f"what does {word} mean?",
        f"{word} definition",
    ]
    forms += [f"What is the meaning of {word}?", f"definition of the word {word}"]
    return rng.choice(forms)


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
            form = rng.random()
            written = text if form < 0.35 else f"{word}: {text}" if form < 0.7 else f"{word.capitalize()}. {text}"
            yield Pair(question(word, rng), written)
