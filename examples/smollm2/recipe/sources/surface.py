"""How people type: capitals, no punctuation, slips of the finger."""

import random
import re


def typed(query: str, rng: random.Random) -> str:
    """A query as somebody might have typed it; most stay as they are."""
    query, draw = " ".join(query.split()), rng.random()
    if draw < 0.08:
        return query.upper()
    if draw < 0.23:
        return bare(query)
    if draw < 0.28:
        return mistyped(query, rng)
    if draw < 0.48:
        return query.rstrip("?. ")
    return query


def bare(query: str) -> str:
    """Lower case, without punctuation except inside words."""
    return " ".join(re.sub(r"(?<!\w)[^\w\s]+|[^\w\s]+(?!\w)", " ", query.lower()).split())


def mistyped(query: str, rng: random.Random) -> str:
    """One long word of the query with a letter dropped or two letters swapped; its first letter stays."""
    places = [match.span() for match in re.finditer(r"[A-Za-z]{5,}", query)]
    if not places:
        return query
    start, end = rng.choice(places)
    at = rng.randrange(start + 1, end - 1)
    swapped = query[at + 1] + query[at] if rng.random() < 0.5 else query[at + 1]
    return query[:at] + swapped + query[at + 2 :]
