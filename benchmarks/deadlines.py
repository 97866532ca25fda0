"""What deadlines cost in quality: rankings within so many milliseconds, beside those of fixed depths and a cascade.

    python -m benchmarks.deadlines --data demo_output/docstrings --dtype bfloat16 --output deadlines.json

Each query's candidates are ranked in every way by turns. Deadlines are shares of the median time that full depth takes
for the first queries, which are ranked before anything is measured. Of rankings that come after their deadline it says
how many went on behind the first exit, which always runs. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measuring import environment
from flagembedding_matryoshka import SMOLLM2, MatryoshkaReranker
from flagembedding_matryoshka.evaluation.candidates import Candidates, from_bm25, sample_queries
from flagembedding_matryoshka.evaluation.runs import QUALITY, in_order, mean, per_query
from flagembedding_matryoshka.text.collections import read_collection

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
FIRST_QUERIES = 10
CASCADE_SHARE = 0.3
CANDIDATES = 30
LENGTHS = {"query_max_length": 64, "max_length": 192}
"""The demo's."""


@dataclass
class Way:
    """One way to rank, and what it found.

    Attributes:
        options: of `MatryoshkaReranker.rank`.
        rankings: query id to passage ids, the best first.
        exits: query id to the exit where each was read.
        milliseconds: of each query.
    """

    options: Mapping[str, Any]
    rankings: dict[str, list[str]] = field(default_factory=dict)
    exits: dict[str, list[int]] = field(default_factory=dict)
    milliseconds: list[float] = field(default_factory=list)

    def rank(self, reranker: MatryoshkaReranker, candidates: Candidates, query: str) -> None:
        start = time.perf_counter()
        texts = candidates.collection.queries[query], candidates.texts(query)
        hits = reranker.rank(*texts, show_progress_bar=False, **self.options)
        self.milliseconds.append(1000 * (time.perf_counter() - start))
        self.rankings[query] = [candidates.passages[query][hit["corpus_id"]] for hit in hits]
        self.exits[query] = [hit.get("cutoff_layer", self.options.get("cutoff_layers")) for hit in hits]

    def summary(self, candidates: Candidates) -> dict[str, Any]:
        """What a row of the table says."""
        quality = per_query(candidates, in_order(self.rankings), 10)
        summary = {
            **self.options,
            QUALITY: round(mean(quality[QUALITY]), 4),
            "milliseconds": round(statistics.median(self.milliseconds), 1),
            "exit_of_first_ten": round(mean([exit for exits in self.exits.values() for exit in exits[:10]]), 1),
            "exit_of_all": round(mean([exit for exits in self.exits.values() for exit in exits]), 1),
        }
        return summary | self.lateness() if "deadline_ms" in self.options else summary

    def lateness(self) -> dict[str, Any]:
        """How many rankings came after the deadline, how many of these went on behind the first exit, and by how many
        milliseconds the last of these was late."""
        late = {
            query: taken - self.options["deadline_ms"]
            for query, taken in zip(self.exits, self.milliseconds, strict=True)
            if taken > self.options["deadline_ms"]
        }
        first_exit = min(exit for exits in self.exits.values() for exit in exits)
        deeper = [late[query] for query in late if max(self.exits[query]) > first_exit]
        return {
            "late": len(late),
            "late_behind_first_exit": len(deeper),
            "latest_behind_first_exit_milliseconds": round(max(deeper, default=0.0), 1),
        }


def measure(reranker: MatryoshkaReranker, candidates: Candidates) -> list[dict[str, Any]]:
    """Each way's summary: fixed depths, a cascade, then deadlines, the shortest first."""
    queries = [query for query, passages in candidates.passages.items() if passages]
    first = Way({})
    for query in [queries[0], *queries[:FIRST_QUERIES]]:
        first.rank(reranker, candidates, query)
    full = statistics.median(first.milliseconds[1:])
    print(f"full depth takes {full:.0f} ms", flush=True)
    ways = [Way({"cutoff_layers": layer}) for layer in reranker.config.exit_layers]
    ways.append(Way({"cascade": {reranker.config.exit_layers[0]: CASCADE_SHARE}}))
    ways += [Way({"deadline_ms": round(share * full, 1)}) for share in SHARES]
    for number, query in enumerate(queries):
        for turn in range(len(ways)):
            ways[(turn + number) % len(ways)].rank(reranker, candidates, query)
        if number % 10 == 9:
            print(f"{number + 1} of {len(queries)} queries", flush=True)
    return [way.summary(candidates) for way in ways]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| ranked | nDCG@10 | ms, median | exit of the first ten | of all | late | … behind the first exit | … by ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        match row:
            case {"cutoff_layers": layer}:
                name = f"{layer} layers"
            case {"cascade": stages}:
                name = "cascade " + ", ".join(f"{layer}:{share}" for layer, share in stages.items())
            case {"deadline_ms": limit}:
                name = f"in {limit:.0f} ms"
        late = [row.get(key, "") for key in ("late", "late_behind_first_exit", "latest_behind_first_exit_milliseconds")]
        cells = [name, f"{row[QUALITY]:.3f}", row["milliseconds"], row["exit_of_first_ten"], row["exit_of_all"], *late]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="default: %(default)s")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a collection in BEIR's layout")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--queries", type=int, help="as many, drawn; default: all")
    parser.add_argument("--dtype", default="auto", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    collection = sample_queries(read_collection(options.data, options.split), options.queries, 0)
    candidates = from_bm25(collection, CANDIDATES)
    reranker = MatryoshkaReranker(options.model, dtype=options.dtype, devices="cpu", **LENGTHS)
    about = environment("cpu") | {"dtype": str(reranker.model.dtype).removeprefix("torch.")}
    rows = measure(reranker, candidates)
    print(table(rows))
    report = {"machine": about, "candidates": candidates.source, "queries": len(candidates.passages), "ways": rows}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
