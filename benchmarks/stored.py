"""Measure what stored passages cost in quality, and what they save in operations, time and bytes.

    python -m benchmarks.stored --data demo_output/docstrings --dtype bfloat16 --output stored.json --figure stored.svg

The candidates of each query are ranked from texts, at several depths and ratios, and from stores of these passages, at
several store layers and ratios. All ways take turns at each query, after the first queries, which are ranked before
anything is measured. Changes of nDCG@10 are against the deepest exit at full width without a store. With
`--state_quantization int8` each store is there a second time, in int8. Its scores are compared with those of the first
one: largest and mean difference, and Kendall's tau of the passages of a query. The last line is JSON.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import kendalltau

from benchmarks.measuring import LENGTHS, change, environment, quality, ranking_parser, read_candidates
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.measure import full_network, grid
from flagembedding_matryoshka.evaluation.runs import QUALITY, mean
from flagembedding_matryoshka.inference.store import PassageStore
from flagembedding_matryoshka.models.split import StateQuantization
from flagembedding_matryoshka.setting import Setting

FIRST_QUERIES = 3
COMPRESSED_AFTER = 3
"""The layer after which texts are compressed."""
DIFFERENCES = ("largest_difference", "mean_difference", "tau")


@dataclass
class Way:
    """Rankings of all queries by one setting.

    Attributes:
        setting: the setting. With a store layer, passages are read from the store.
        store: the store; None without a store layer.
        rankings: query id to passage ids, best first.
        scores: query id to the score of each passage, in the order of the candidates.
        seconds: time of each query.
        flops: operations of all pairs.
    """

    setting: Setting
    store: PassageStore | None = None
    rankings: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    flops: int = 0

    @property
    def state_quantization(self) -> StateQuantization | None:
        """The format of stored states; None is the model's dtype, or no store."""
        return None if self.store is None else self.store.conditions.state_quantization

    def rank(self, reranker: MatryoshkaReranker, candidates: Candidates, query: str) -> None:
        """Rank the candidates of a query."""
        text, passages = candidates.collection.queries[query], candidates.passages[query]
        listed = candidates.texts(query) if self.store is None else None
        stored = {} if self.store is None else {"ids": passages, "store": self.store}
        start = time.perf_counter()
        hits = reranker.rank(text, listed, show_progress_bar=False, **stored, **self.setting.arguments)
        self.seconds.append(time.perf_counter() - start)
        self.rankings[query] = [passages[hit["corpus_id"]] for hit in hits]
        self.scores[query] = [hit["score"] for hit in sorted(hits, key=lambda hit: hit["corpus_id"])]
        self.flops += reranker.estimate_flops(
            candidates.pairs([query]), stored=self.store is not None, **self.setting.arguments
        )


def measure(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    store_layers: Sequence[int],
    ratios: Sequence[int],
    directory: Path,
    state_quantization: StateQuantization | None = None,
    cutoff_layers: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Return the row of each way: all exits and ratios from texts, then those of each store layer from stores.

    Args:
        reranker: the model.
        candidates: the candidates that it ranks.
        store_layers: numbers of layers of stored passages.
        ratios: ratios of texts, after `COMPRESSED_AFTER`, and of stored passages, after the store layer.
        directory: directory to write stores to.
        state_quantization: format of a second store for each setting; None is no second store.
        cutoff_layers: exits; None is all exits. The deepest one is there in any case.
    """
    formats = [None] if state_quantization is None else [None, state_quantization]
    needed = {passage for passages in candidates.passages.values() for passage in passages}
    texts = {passage: candidates.collection.passages[passage] for passage in sorted(needed)}
    stores: dict[tuple[Any, ...], PassageStore] = {}
    ways: list[Way] = []
    for setting in grid(reranker.config, cutoff_layers, [COMPRESSED_AFTER], ratios, (), store_layers):
        if not setting.store_layer:
            ways.append(Way(setting))
            continue
        for method in formats:
            key = *setting.width, method
            if key not in stores:
                path = directory / f"{setting.store_layer}-{setting.compress_ratio}-{method}"
                arguments = {"store_layer": setting.store_layer, "compress_ratio": setting.compress_ratio}
                stores[key] = reranker.store(texts, path, **arguments, state_quantization=method)
                print(f"stored {len(texts)} passages: {path.name}", flush=True)
            ways.append(Way(setting, stores[key]))
    queries = [query for query, passages in candidates.passages.items() if passages]
    for way in ways:
        for query in queries[:FIRST_QUERIES]:
            Way(way.setting, way.store).rank(reranker, candidates, query)
    for number, query in enumerate(queries):
        for turn in range(len(ways)):
            ways[(turn + number) % len(ways)].rank(reranker, candidates, query)
        if number % 10 == 9:
            print(f"{number + 1} of {len(queries)} queries", flush=True)
    full = next(way for way in ways if way.setting == full_network(reranker.config))
    plain = {way.setting: way for way in ways if way.state_quantization is None}
    return [summary(way, full, candidates, plain[way.setting]) for way in ways]


def summary(way: Way, full: Way, candidates: Candidates, plain: Way | None = None) -> dict[str, Any]:
    """Return a row of the table: a way beside the full network.

    Args:
        plain: the way of the same setting with states in the model's dtype, to compare scores with; None is the way.
    """
    values, reference = quality(candidates, way.rankings), quality(candidates, full.rankings)
    return {
        **way.setting.to_json(),
        QUALITY: round(mean(values), 4),
        **change(values, reference),
        "share_of_operations": round(way.flops / full.flops, 4),
        "pairs_per_s": round(len(candidates) / sum(way.seconds), 1),
        "times_as_fast": round(sum(full.seconds) / sum(way.seconds), 2),
        "bytes_per_passage": round(way.store.bytes_per_passage) if way.store is not None else None,
        "state_quantization": way.state_quantization,
        **(difference(way, plain) if plain is not None and plain is not way else {}),
    }


def difference(way: Way, plain: Way) -> dict[str, float]:
    """Return how far the scores of two ways are apart, and the mean of Kendall's tau over queries of two passages."""
    own, others = ([np.array(scores[query]) for query in way.scores] for scores in (way.scores, plain.scores))
    apart = np.abs(np.concatenate(own) - np.concatenate(others))
    taus = [kendalltau(*both).statistic for both in zip(own, others, strict=True) if len(both[0]) > 1]
    return {
        "largest_difference": round(float(apart.max()), 4),
        "mean_difference": round(float(apart.mean()), 4),
        "tau": round(float(np.nanmean(taus)), 4),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| store layer | ratio | states | exit | nDCG@10 | change | p | operations | pairs/s | times as fast | bytes | "
        "largest difference | mean | tau |",
        "|" + "---|" * 14,
    ]
    for row in rows:
        size = "" if row["bytes_per_passage"] is None else f"{row['bytes_per_passage']:,}"
        cells = [row["store_layer"] or "", row["compress_ratio"], row["state_quantization"] or ""]
        cells += [*row["cutoff_layers"], f"{row[QUALITY]:.3f}"]
        cells += [f"{row['change']:+.3f}", f"{row['p']:.3f}", f"{row['share_of_operations']:.3f}"]
        cells += [f"{row['pairs_per_s']:.1f}", f"{row['times_as_fast']:.2f}", size]
        cells += [f"{row[name]:.3f}" if name in row else "" for name in DIFFERENCES]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], first_stage: float, path: Path) -> None:
    """Draw nDCG@10 against operations and time: of the deepest exit, and of all exits of texts at full width.

    Args:
        rows: the rows of `measure`. Those with a quantization are left out.
        first_stage: nDCG@10 of the first stage.
        path: SVG file to write.
    """
    rows = [row for row in rows if row["state_quantization"] is None]
    deepest = max(row["cutoff_layers"][0] for row in rows)
    lines = {"texts, by exit": [row for row in rows if not row["store_layer"] and row["compress_ratio"] == 1]}
    lines["texts, by ratio"] = [row for row in rows if not row["store_layer"] and row["cutoff_layers"] == [deepest]]
    for layer in sorted({row["store_layer"] for row in rows} - {0}):
        lines[f"stored after {layer} layers, by ratio"] = [
            row for row in rows if row["store_layer"] == layer and row["cutoff_layers"] == [deepest]
        ]
    figure = Figure(figsize=(9, 4), layout="constrained")
    plots = figure.subplots(1, 2, sharey=True)
    for plot, cost in zip(plots, ("operations", "time"), strict=True):
        for name, points in lines.items():
            shares = [
                row["share_of_operations"] if cost == "operations" else 1 / row["times_as_fast"] for row in points
            ]
            plot.plot(shares, [row[QUALITY] for row in points], "o-" if name.startswith("texts") else "s--", label=name)
        plot.axhline(first_stage, color="grey", linewidth=1, label="first stage")
        plot.set_xscale("log")
        plot.set_xlabel(f"{cost} per pair, as a fraction of the full network's")
        plot.grid(alpha=0.3)
    plots[0].set_ylabel("nDCG@10")
    plots[1].legend(fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "stored", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ranking_parser(__doc__)
    parser.add_argument("--candidates", type=int, default=30, help="of a query; default: %(default)s")
    parser.add_argument("--store_layers", type=int, nargs="+", default=[3, 6, 9], help="default: %(default)s")
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 2, 4, 8], help="default: %(default)s")
    parser.add_argument("--cutoff_layers", type=int, nargs="+", help="exits; default: all")
    parser.add_argument(
        "--state_quantization", choices=get_args(StateQuantization), help="format of the second stores; default: none"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="an SVG file to draw; default: none")
    options = parser.parse_args(arguments)
    candidates = read_candidates(options, options.candidates)
    reranker = MatryoshkaReranker(options.model, dtype=options.dtype, devices="cpu", **LENGTHS)
    about = environment("cpu") | {"dtype": str(reranker.model.dtype).removeprefix("torch.")}
    with tempfile.TemporaryDirectory() as directory:
        widths = options.store_layers, options.ratios
        more = options.state_quantization, options.cutoff_layers
        rows = measure(reranker, candidates, *widths, Path(directory), *more)
    first_stage = mean(quality(candidates, candidates.passages))
    print(table(rows))
    if options.figure:
        draw(rows, first_stage, options.figure)
    report = {
        "machine": about,
        "candidates": candidates.source,
        "queries": len(candidates.passages),
        "first_stage": round(first_stage, 4),
        "ways": rows,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
