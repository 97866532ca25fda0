"""Pairs of a query and an abstract, from titles with abstracts of all sciences.

The id of an abstract alone decides its kind. So no abstract is trained on in one kind and measured in another.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping

from docstrings import Pair
from sources.prose import Prose
from sources.texts import cut, is_english, plain, seeded, sentences

KINDS = ("titles", "abstracts", "phrases", "notes")
MOST_WORDS = 250

Row = Mapping[str, str]


def kind_of(row: Row) -> str:
    """Return the kind that an abstract belongs to."""
    return seeded("arxiv", row["id"]).choice(KINDS)


def abstract_pairs(seed: int, rows: Iterable[Row]) -> dict[str, list[Pair]]:
    """Make pairs by kind, at most one for each abstract.

    Kinds:
        titles: title → abstract without its title.
        abstracts: one or two sentences → the other sentences.
        phrases: key phrases, or a long request with phrases → abstract.
        notes: a sentence, phrases or a request → title with at most two other sentences, as in short records.

    Half of the passages of abstracts and phrases begin with their title.

    Args:
        seed: seed of all draws.
        rows: with the fields id, title and abstract.
    """
    english = [row for row in rows if is_english(row["abstract"])]
    prose = Prose([plain(row["abstract"]) for row in english])
    makers: dict[str, Callable[[str, str, random.Random, Prose], Pair | None]] = {
        "titles": title_pair,
        "abstracts": sentence_pair,
        "phrases": phrase_pair,
        "notes": note_pair,
    }
    pairs: dict[str, list[Pair]] = {kind: [] for kind in KINDS}
    for row in english:
        kind, rng = kind_of(row), seeded(seed, "abstract", row["id"])
        pair = makers[kind](plain(row["title"]), plain(row["abstract"]), rng, prose)
        if pair is not None and pair.query and len(pair.query.split()) >= 2:
            pairs[kind].append(pair)
    return pairs


def title_pair(title: str, abstract: str, rng: random.Random, prose: Prose) -> Pair | None:
    """Make a pair with the title as the query."""
    return Pair(title, shortened(abstract, rng))


def sentence_pair(title: str, abstract: str, rng: random.Random, prose: Prose) -> Pair | None:
    """Make a pair with one or two neighbouring sentences as the query; the passage does not contain them.

    Returns:
        None if the abstract has too few sentences, or the query would be too short or too long.
    """
    parts = sentences(abstract)
    if len(parts) < 4:
        return None
    size = 2 if rng.random() < 0.35 else 1
    start = 0 if rng.random() < 0.4 else rng.randrange(len(parts) - size + 1)
    query, rest = " ".join(parts[start : start + size]), " ".join([*parts[:start], *parts[start + size :]])
    if not 6 <= len(query.split()) <= 70:
        return None
    return Pair(query, titled(title, shortened(rest, rng), rng))


def phrase_pair(title: str, abstract: str, rng: random.Random, prose: Prose) -> Pair | None:
    """Make a pair with key phrases or a long request as the query; None if the abstract has too few phrases."""
    query = phrases(abstract, rng, prose)
    return query and Pair(query, titled(title, shortened(abstract, rng), rng))


def note_pair(title: str, abstract: str, rng: random.Random, prose: Prose) -> Pair | None:
    """Make a pair of a title with at most two sentences, and a query from the other sentences; None if it cannot be."""
    parts = sentences(abstract)
    if len(parts) < 4:
        return None
    size = rng.choice((0, 0, 1, 1, 2))
    start = rng.randrange(len(parts) - size + 1)
    rest = [*parts[:start], *parts[start + size :]]
    if rng.random() < 0.5:
        query = rng.choice([part for part in rest if 6 <= len(part.split()) <= 50] or [None])
    else:
        query = phrases(" ".join(rest), rng, prose)
    return query and Pair(query, " ".join([title + ".", *parts[start : start + size]]))


def phrases(text: str, rng: random.Random, prose: Prose) -> str | None:
    """Draw a query of keywords, of two to four phrases, or of a request with phrases; None if there are too few."""
    draw = rng.random()
    if draw < 0.35:
        return prose.keywords(text, rng)
    if draw < 0.6:
        return prose.request(text, rng)
    found = prose.phrases(text)
    if len(found) < 2:
        return None
    places = sorted(rng.sample(range(len(found)), min(len(found), rng.randint(2, 4))))
    return (", " if rng.random() < 0.3 else " ").join(found[place] for place in places)


def titled(title: str, text: str, rng: random.Random) -> str:
    """Put the title before the text, half of the time."""
    return f"{title}. {text}" if rng.random() < 0.5 else text


def shortened(text: str, rng: random.Random) -> str:
    """Cut the text to its first 250 words, or half of the time to a drawn beginning."""
    return cut(text, rng) if rng.random() < 0.5 else " ".join(text.split()[:MOST_WORDS])


def distinct_titles(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the first row of each title; case is ignored."""
    seen: set[str] = set()
    for row in rows:
        title = row["title"].lower()
        if title not in seen:
            seen.add(title)
            yield row
