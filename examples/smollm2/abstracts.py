"""Pairs of a query and an abstract, from titles with abstracts of all sciences.

Every abstract belongs to one kind, by its id alone: no abstract is trained on in one kind and measured in another.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping

from docstrings import Pair
from prose import Prose
from texts import cut, is_english, plain, seeded, sentences

KINDS = ("titles", "abstracts", "phrases", "notes")
MOST_WORDS = 250

Row = Mapping[str, str]


def kind_of(row: Row) -> str:
    """The kind that an abstract belongs to."""
    return seeded("arxiv", row["id"]).choice(KINDS)


def abstract_pairs(seed: int, rows: Iterable[Row]) -> dict[str, list[Pair]]:
    """A pair for each abstract that a query can be made for, by kind.

    Kinds:
        titles: title → abstract without its title.
        abstracts: a sentence or two → the other sentences.
        phrases: key phrases, or a long request that names phrases → abstract.
        notes: a sentence, phrases or a request → title with at most two other sentences, as short records have.

    Half of the passages begin with their title, except where the title is the query.
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
    """The title as the query."""
    return Pair(title, shortened(abstract, rng))


def sentence_pair(title: str, abstract: str, rng: random.Random, prose: Prose) -> Pair | None:
    """The first sentence, one from the middle or two neighbours as the query, and no longer in the passage."""
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
    """Key phrases or a long request as the query."""
    query = phrases(abstract, rng, prose)
    return query and Pair(query, titled(title, shortened(abstract, rng), rng))


def note_pair(title: str, abstract: str, rng: random.Random, prose: Prose) -> Pair | None:
    """A passage of a title and at most two sentences; the query is made from the other sentences."""
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
    """Keywords, two to four phrases in a row, or a request in which phrases stand."""
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
    """The text, half of the time with its title in front."""
    return f"{title}. {text}" if rng.random() < 0.5 else text


def shortened(text: str, rng: random.Random) -> str:
    """The whole text, up to 250 words, or half of the time its beginning."""
    return cut(text, rng) if rng.random() < 0.5 else " ".join(text.split()[:MOST_WORDS])


def distinct_titles(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows whose title is new."""
    seen: set[str] = set()
    for row in rows:
        title = row["title"].lower()
        if title not in seen:
            seen.add(title)
            yield row
