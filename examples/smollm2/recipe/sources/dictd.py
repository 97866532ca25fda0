"""Reading dictionaries in dictd's format: an index of headwords and places, and the text they lie in."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


@dataclass(frozen=True)
class Entry:
    """A headword in the case its dictionary writes it in, as far as that can be told, and the entry's text."""

    headword: str
    text: str


def number(digits: str) -> int:
    """dictd writes numbers in base 64."""
    value = 0
    for digit in digits:
        value = value * 64 + DIGITS[digit]
    return value


def entries(index: bytes, content: bytes) -> Iterator[Entry]:
    """The entries in the order of the index, each stretch of text once, under the first headword that points to it."""
    seen = set()
    for line in index.decode("utf-8").splitlines():
        headword, start, length = line.split("\t")[:3]
        if headword.startswith(("00database", "00-database")) or start in seen:
            continue
        seen.add(start)
        place = number(start)
        text = content[place : place + number(length)].decode("utf-8", "replace")
        first = text.strip().partition("\n")[0].strip()
        yield Entry(first if first.lower() == headword.lower() else headword, text)


def gloss(text: str) -> str:
    """The first sense of an entry in plain words: no headword line, etymology, cross-reference marks or sources."""
    body = re.sub(r"\[[^\]]*\]", " ", text.strip())
    start = re.match(r"[A-Z' -]+, (?:\w+\.)+\s", body) or re.search(r"(?m)^(?=[ \t]+\S)", body)
    body = body[start.end() :] if start else body
    body = re.sub(r"\\[^\\\n]*\\|--[A-Z][\w. &]+|<[^>]*>|\(\d{4}-\d\d-\d\d\)", " ", body)
    body = re.sub(r"(?s)\b(?:Syn|Note|Synonyms):.*", "", body)
    senses = re.split(r"(?:^|\s)(?:(?:n|v|adj|adv) )?\d+[.:]\s", body)
    longest = max(senses, key=lambda sense: len(sense.split()))
    plain = re.sub(r"^\s*(?:n|v|adj|adv|a)(?:\.|\s*:)\s*", "", longest)
    plain = re.sub(r"[{}_]|/[^/\s]+/,?", "", plain)
    return " ".join(plain.split()).strip(" ;:,")
