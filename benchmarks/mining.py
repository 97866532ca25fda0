"""Measure the retrievers of mining by the number of passages: time, peak memory, and the recall of the index.

    python -m benchmarks.mining --passages 10000 100000 1000000 --output mining.json

Words of the passages are drawn with Zipf's frequencies. Vectors are drawn around centres, as a bi-encoder's lie
in topics. Every size runs in a process of its own. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from benchmarks.measuring import environment
from flagembedding_matryoshka.mining.bm25 import BM25
from flagembedding_matryoshka.mining.retrievers import exact_search, index_search

VOCABULARY, PASSAGE_WORDS, QUERY_WORDS = 50_000, 60, 8
WIDTH, PASSAGES_PER_CENTRE, NOISE = 384, 200, 0.7
TOP_K = 100


def draw_texts(count: int, words: int, draw: np.random.Generator) -> list[str]:
    """Return texts of words whose frequency falls with their rank."""
    weights = 1 / np.arange(1, VOCABULARY + 1)
    weights /= weights.sum()
    names = np.array([f"w{number}" for number in range(VOCABULARY)])
    sizes = (min(10_000, count - start) for start in range(0, count, 10_000))
    rows = (draw.choice(names, (size, words), p=weights).tolist() for size in sizes)
    return [" ".join(row) for some in rows for row in some]


def draw_vectors(count: int, centres: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return unit vectors around centres, (count, WIDTH) float32."""
    chosen = centres[torch.randint(len(centres), (count,), generator=draw)]
    return normalize(chosen + NOISE * normalize(torch.randn(count, WIDTH, generator=draw), dim=-1), dim=-1)


def measure(passages: int, queries: int) -> dict[str, Any]:
    """Return seconds and peak memory of BM25, of exact search and of the index."""
    row: dict[str, Any] = {"passages": passages}

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        row[f"{name} s"] = round(time.perf_counter() - start, 2)
        row[f"peak GB after {name}"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)

    draw = np.random.default_rng(0)
    corpus, asked = draw_texts(passages, PASSAGE_WORDS, draw), draw_texts(queries, QUERY_WORDS, draw)
    with measured("BM25 index"):
        index = BM25(corpus)
    with measured("BM25 search"):
        for _ in index.lists(asked, TOP_K):
            pass
    pairs = [(query, int(place)) for query in asked for place in draw.integers(passages, size=16)]
    with measured("BM25 pairs"):
        index.pair_scores([query for query, _ in pairs], [place for _, place in pairs])
    del index, corpus
    generator = torch.Generator().manual_seed(0)
    centres = normalize(torch.randn(max(1, passages // PASSAGES_PER_CENTRE), WIDTH, generator=generator), dim=-1)
    stored, wanted = (draw_vectors(count, centres, generator) for count in (passages, queries))
    with measured("exact search"):
        exact = exact_search(stored)(wanted, TOP_K)
    with measured("index"):
        search = index_search(stored)
    with measured("index search"):
        found = search(wanted, TOP_K)
    shared = [len(set(some) & set(every)) for some, every in zip(found, exact, strict=True)]
    row["recall of the index"] = round(sum(shared) / (queries * min(TOP_K, passages)), 3)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", required=True, help="numbers of passages")
    parser.add_argument("--queries", type=int, default=1000, help="number of queries (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file of the results")
    options = parser.parse_args(arguments)
    if len(options.passages) == 1:
        rows = [measure(options.passages[0], options.queries)]
    else:
        own = [sys.executable, "-m", "benchmarks.mining", "--queries", str(options.queries), "--passages"]
        rows = []
        for count in options.passages:
            done = subprocess.run([*own, str(count)], check=True, capture_output=True, text=True)
            rows += json.loads(done.stdout.splitlines()[-1])["rows"]
            print(json.dumps(rows[-1]), flush=True)
    report = {"machine": environment("cpu"), "queries": options.queries, "top_k": TOP_K, "rows": rows}
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
