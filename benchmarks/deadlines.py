"""Measure the ranking quality of deadlines, beside those of fixed depths and a cascade.

    python -m benchmarks.deadlines --data demo_output/docstrings --dtype bfloat16 --output deadlines.json

Each query's candidates are ranked in every way by turns. Deadlines are fractions of the median time of full depth for
the first queries, which are ranked before anything is measured. The first exit always runs, so a ranking may be late.
For late rankings the table counts those that went deeper than the first exit. The last line is a JSON object.

With `--stops 7 99` the model gets every exit from its first to its deepest, and each deadline is kept with at most 7
and with at most 99 stops. The table compares the nDCG@10 of the second number with that of the first.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from benchmarks.measuring import LENGTHS, change, environment, quality, ranking_parser, read_candidates
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.runs import QUALITY, mean
from flagembedding_matryoshka.inference import deadline

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
COMPARED_SHARES = (0.6, 0.8)
"""Fractions of full depth's time at which numbers of stops are compared."""
FIRST_QUERIES = 10
CASCADE_SHARE = 0.3
CANDIDATES = 30


@dataclass
class Way:
    """One way to rank, and its rankings.

    Attributes:
        options: options of `MatryoshkaReranker.rank`.
        stops: largest number of exits where candidates stop before a deadline.
        rankings: query id to passage ids, best first.
        exits: query id to the exit of each passage's score, best passage first.
        milliseconds: time of each query.
    """

    options: Mapping[str, Any]
    stops: int = deadline.STOPS
    rankings: dict[str, list[str]] = field(default_factory=dict)
    exits: dict[str, list[int]] = field(default_factory=dict)
    milliseconds: list[float] = field(default_factory=list)

    def rank(self, reranker: MatryoshkaReranker, candidates: Candidates, query: str) -> None:
        """Rank the candidates of a query."""
        texts = candidates.collection.queries[query], candidates.texts(query)
        with mock.patch.object(deadline, "STOPS", self.stops):
            start = time.perf_counter()
            hits = reranker.rank(*texts, show_progress_bar=False, **self.options)
            self.milliseconds.append(1000 * (time.perf_counter() - start))
        self.rankings[query] = [candidates.passages[query][hit["corpus_id"]] for hit in hits]
        self.exits[query] = [hit.get("cutoff_layer", self.options.get("cutoff_layers")) for hit in hits]

    def summary(self, candidates: Candidates) -> dict[str, Any]:
        """Return a row of the table."""
        summary = {
            **self.options,
            QUALITY: round(mean(quality(candidates, self.rankings)), 4),
            "milliseconds": round(statistics.median(self.milliseconds), 1),
            "exit_of_first_ten": round(mean([exit for exits in self.exits.values() for exit in exits[:10]]), 1),
            "exit_of_all": round(mean([exit for exits in self.exits.values() for exit in exits]), 1),
        }
        return summary | {"stops": self.stops} | self.lateness() if "deadline_ms" in self.options else summary

    def lateness(self) -> dict[str, Any]:
        """Return the number of late rankings, the number of those that went deeper than the first exit, and by how many
        milliseconds the latest of these was late."""
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


def measure(reranker: MatryoshkaReranker, candidates: Candidates, stops: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Return the row of each way: fixed depths, a cascade, then deadlines, the shortest first.

    Args:
        reranker: the model.
        candidates: the candidates that it ranks.
        stops: two numbers of stops to compare, by the deepest exit and deadlines alone; empty is the model's own.
    """
    queries = [query for query, passages in candidates.passages.items() if passages]
    first = Way({})
    for query in [queries[0], *queries[:FIRST_QUERIES]]:
        first.rank(reranker, candidates, query)
    full = statistics.median(first.milliseconds[1:])
    print(f"full depth takes {full:.0f} ms", flush=True)
    exits = reranker.config.exit_layers
    if stops:
        ways = [Way({"cutoff_layers": exits[-1]})]
    else:
        ways = [Way({"cutoff_layers": layer}) for layer in exits]
        ways.append(Way({"cascade": {exits[0]: CASCADE_SHARE}}))
    limits = [round(share * full, 1) for share in (COMPARED_SHARES if stops else SHARES)]
    ways += [Way({"deadline_ms": limit}, count) for limit in limits for count in stops or [deadline.STOPS]]
    for number, query in enumerate(queries):
        for turn in range(len(ways)):
            ways[(turn + number) % len(ways)].rank(reranker, candidates, query)
        if number % 10 == 9:
            print(f"{number + 1} of {len(queries)} queries", flush=True)
    rows = [way.summary(candidates) for way in ways]
    for place in range(2, len(ways), 2) if stops else ():
        rows[place] |= change(*(quality(candidates, ways[number].rankings) for number in (place, place - 1)))
    return rows


def use_every_exit(reranker: MatryoshkaReranker) -> None:
    """Give a model every exit from its first to its deepest. New ones read with a copy of the deepest head."""
    exits = reranker.config.exit_layers
    reranker.model._use_exits(range(exits[0], exits[-1] + 1))
    reranker.config = reranker.model.config


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| ranked by | nDCG@10 | change | ms, median | mean exit of the first ten | of all | late rankings | "
        "… after the first exit | … by ms, at most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        match row:
            case {"cutoff_layers": layer}:
                name = f"{layer} layers"
            case {"cascade": stages}:
                name = "cascade " + ", ".join(f"{layer}:{share}" for layer, share in stages.items())
            case {"deadline_ms": limit, "stops": stops}:
                name = f"in {limit:.0f} ms, {stops} stops"
        difference = f"{row['change']:+.4f} {row['interval']} (p = {row['p']})" if "change" in row else ""
        late = [row.get(key, "") for key in ("late", "late_behind_first_exit", "latest_behind_first_exit_milliseconds")]
        times = row["milliseconds"], row["exit_of_first_ten"], row["exit_of_all"]
        lines.append("| " + " | ".join(map(str, [name, f"{row[QUALITY]:.3f}", difference, *times, *late])) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ranking_parser(__doc__)
    parser.add_argument(
        "--stops", type=int, nargs=2, default=(), metavar="N", help="compare two numbers of stops; default: the model's"
    )
    options = parser.parse_args(arguments)
    candidates = read_candidates(options, CANDIDATES)
    reranker = MatryoshkaReranker(options.model, dtype=options.dtype, devices="cpu", **LENGTHS)
    if options.stops:
        use_every_exit(reranker)
    about = environment("cpu") | {"dtype": str(reranker.model.dtype).removeprefix("torch.")}
    rows = measure(reranker, candidates, options.stops)
    print(table(rows))
    report = {"machine": about, "candidates": candidates.source, "queries": len(candidates.passages), "ways": rows}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
