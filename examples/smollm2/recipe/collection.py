"""Writing pairs as a collection in BEIR's layout."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from docstrings import Pair, normalise
from sources.surface import typed
from sources.texts import seeded

from flagembedding_matryoshka.files import write_text

SPLITS = ("train", "dev", "test")
FILES = ("corpus.jsonl", "queries.jsonl", *(f"qrels/{split}.tsv" for split in SPLITS))
HELD_OUT_PERCENT = 2
MOST_HELD_OUT = 300
SHINGLE, ONE_OF, MOST_SHARED = 8, 4, 0.5
"""Near-duplicates: words in a run, 1 of so many runs is kept by its hash, and the highest fraction of runs seen before.

Broder et al., Syntactic clustering of the web, WWW 1997.
"""


def is_complete(directory: Path) -> bool:
    """Whether all files of a collection are there; each is written whole or not at all."""
    return all((directory / name).is_file() for name in FILES)


def distinct(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Yield the pairs whose query and passage are both new, so that no passage answers another pair's query.

    A passage is a near-duplicate, and not new, if earlier passages have more than half of its runs of words.
    """
    seen: set[object] = set()
    for pair in pairs:
        keys = {("query", normalise(pair.query)), ("passage", normalise(pair.passage)[:150])}
        runs = shingles(pair.passage)
        if not keys & seen and len(runs & seen) <= MOST_SHARED * len(runs):
            seen |= keys | runs
            yield pair


def shingles(text: str) -> set[int]:
    """Return hashes of a fourth of the runs of eight words in a text."""
    words = normalise(text).split()
    hashes = {zlib.crc32(" ".join(words[at : at + SHINGLE]).encode()) for at in range(len(words) - SHINGLE + 1)}
    return {number for number in hashes if number % ONE_OF == 0}


def split_of(query: str, percent: int = HELD_OUT_PERCENT) -> str:
    """Return the split of a query, by its hash. It does not depend on the other queries.

    Args:
        query: the query.
        percent: percentage of the queries in dev, and the same in test.

    The hash is not the one of `docstrings.split`.
    """
    place = int(hashlib.sha256(f"dev {normalise(query)}".encode()).hexdigest(), 16) % 100
    return "dev" if place < percent else "test" if place < 2 * percent else "train"


def write_collection(
    directory: Path, pairs: Iterable[Pair], limit: int, seed: int, percent: int = HELD_OUT_PERCENT
) -> bool:
    """Write a seeded sample of pairs as a collection.

    The collection has at most `limit` training queries, 300 queries of dev, 300 of test, and 0.6 × `limit` further
    passages.

    Args:
        directory: folder of the collection.
        pairs: pairs to draw from.
        limit: number of training queries at most.
        seed: seed of the sample.
        percent: as in `split_of`.

    Returns:
        False if there are no pairs; then nothing is written.
    """
    pairs = sorted(pairs, key=lambda pair: seeded(seed, pair.query, pair.passage).random())
    most = {"train": limit, "dev": MOST_HELD_OUT, "test": MOST_HELD_OUT}
    chosen: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    others = []
    for pair in distinct(pairs):
        split = split_of(pair.query, percent)
        if len(chosen[split]) < most[split]:
            chosen[split].append(pair)
        elif len(others) < limit * 3 // 5:
            others.append(pair)
    if not any(chosen.values()):
        return False
    corpus, queries = [], []
    qrels = {split: ["query-id\tcorpus-id\tscore"] for split in SPLITS}
    for split, kept in chosen.items():
        for pair in kept:
            number = len(queries)
            corpus.append({"_id": f"p{number}", "text": pair.passage})
            queries.append({"_id": f"q{number}", "text": typed(pair.query, seeded(seed, "typed", pair.query))})
            qrels[split].append(f"q{number}\tp{number}\t1")
    corpus += [{"_id": f"p{len(corpus) + number}", "text": pair.passage} for number, pair in enumerate(others)]
    write_text(directory / "corpus.jsonl", jsonl(corpus))
    write_text(directory / "queries.jsonl", jsonl(queries))
    for split, lines in qrels.items():
        write_text(directory / "qrels" / f"{split}.tsv", "\n".join(lines) + "\n")
    return True


def jsonl(rows: Iterable[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def counts(directory: Path) -> dict[str, float]:
    """How many queries and passages a written collection has and how long they are in words."""
    rows = {}
    for name in ("queries", "corpus"):
        with (directory / f"{name}.jsonl").open(encoding="utf-8") as file:
            rows[name] = [len(json.loads(line)["text"].split()) for line in file]
    split = {
        f"{name}_queries": len((directory / "qrels" / f"{name}.tsv").read_text().splitlines()) - 1 for name in SPLITS
    }
    mean = {name: round(sum(lengths) / max(1, len(lengths)), 1) for name, lengths in rows.items()}
    return {
        **split,
        "passages": len(rows["corpus"]),
        "words_per_query": mean["queries"],
        "words_per_passage": mean["corpus"],
    }
