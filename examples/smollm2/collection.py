"""Writing pairs as a collection in BEIR's layout."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from docstrings import Pair, normalise
from surface import typed
from texts import seeded

from flagembedding_matryoshka.files import write_text

FILES = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv")
DEV_PERCENT = 4


def is_complete(directory: Path) -> bool:
    """Whether all files of a collection are there; each is written whole or not at all."""
    return all((directory / name).is_file() for name in FILES)


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs whose query and passage are both new: a passage that could answer another's query is not kept."""
    kept, seen = [], set()
    for pair in pairs:
        keys = {("query", normalise(pair.query)), ("passage", normalise(pair.passage)[:150])}
        if not keys & seen:
            seen |= keys
            kept.append(pair)
    return kept


def in_dev(query: str) -> bool:
    """Whether a query is tuned on, by its hash: the same whatever else is collected.

    It is another hash than that by which `docstrings.split` holds pairs out: of what that leaves, a part is tuned on.
    """
    return int(hashlib.sha256(f"dev {normalise(query)}".encode()).hexdigest(), 16) % 100 < DEV_PERCENT


def write_collection(directory: Path, pairs: Iterable[Pair], limit: int, seed: int) -> bool:
    """Write a seeded sample: `limit` queries and, with passages that only distract, 1.6 times as many passages.

    False, and nothing is written, where there are no pairs.
    """
    pairs = sorted(pairs, key=lambda pair: seeded(seed, pair.query, pair.passage).random())
    pairs = distinct(pairs)[: limit * 8 // 5]
    if not pairs:
        return False
    corpus = [{"_id": f"p{number}", "text": pair.passage} for number, pair in enumerate(pairs)]
    queries, qrels = [], {"train": ["query-id\tcorpus-id\tscore"], "dev": ["query-id\tcorpus-id\tscore"]}
    for number, pair in enumerate(pairs[:limit]):
        queries.append({"_id": f"q{number}", "text": typed(pair.query, seeded(seed, "typed", pair.query))})
        qrels["dev" if in_dev(pair.query) else "train"].append(f"q{number}\tp{number}\t1")
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
    train, dev = (len((directory / "qrels" / f"{name}.tsv").read_text().splitlines()) - 1 for name in ("train", "dev"))
    mean = {name: round(sum(lengths) / max(1, len(lengths)), 1) for name, lengths in rows.items()}
    return {
        "train_queries": train,
        "dev_queries": dev,
        "passages": len(rows["corpus"]),
        "words_per_query": mean["queries"],
        "words_per_passage": mean["corpus"],
    }
