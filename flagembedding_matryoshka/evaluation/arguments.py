"""Command line of the evaluation. Benchmarks share some of its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flagembedding_matryoshka.evaluation.fusion import WEIGHTS
from flagembedding_matryoshka.inference.arguments import add_reranker, stage
from flagembedding_matryoshka.inference.fusion import as_weight
from flagembedding_matryoshka.inference.plan import PLAN_NAME
from flagembedding_matryoshka.parser import Parser, program

BM25 = "bm25"
CHECKPOINT = ("start_layer", "layer_sep", "template", "allow_pickle")
RERANKER = ("peft_path", *CHECKPOINT, "dtype", "devices", "batch_size", "query_max_length", "max_length")
"""Options of the re-ranker; those of the checkpoint are read before it is loaded."""
DESCRIPTION = """Measure quality and cost of a re-ranker's depths, widths and cascades on a collection in BEIR layout.

python -m flagembedding_matryoshka.evaluation --model DIR --data DIR --cutoff_layers 8 16 24 \\
    --compress_layers 8 --compress_ratios 1 2 4 --cascade 8:0.5 16:0.2 --output DIR --write_plan
"""


def build_parser() -> Parser:
    """Return the parser of `python -m flagembedding_matryoshka.evaluation`."""
    parser = Parser(prog=program("flagembedding_matryoshka.evaluation"), description=DESCRIPTION)
    data = parser.add_argument_group("candidates")
    data.add_argument("--data", type=Path, required=True, help="directory with corpus.jsonl, queries.jsonl and qrels/")
    data.add_argument(
        "--run",
        action="append",
        metavar="FILE",
        help=f"TREC run of the first stage, whose candidates are re-ranked (default: {BM25}, BM25's candidates); "
        "repeat the option to compare several first stages",
    )
    add_candidates(data)

    add_reranker(parser, RERANKER)
    settings = parser.add_argument_group("settings", "the full network is always measured too")
    settings.add_argument("--cutoff_layers", type=int, nargs="+", help="exits (default: every exit)")
    settings.add_argument(
        "--compress_layers", type=int, nargs="+", default=[], help="layers after which ratios above 1 compress"
    )
    settings.add_argument(
        "--compress_ratios", type=int, nargs="+", default=[1], help="compression ratios (default: 1, no compression)"
    )
    settings.add_argument(
        "--store_layers",
        type=int,
        nargs="+",
        default=[],
        help="also measure with passages that run apart from their queries in this number of layers, as stored "
        "passages do, and that are compressed after them",
    )
    add_cascades(settings)
    settings.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[],
        help="also measure the settings that the model's plan chooses within these fractions of the full network's "
        "operations",
    )

    baselines = parser.add_argument_group("baselines", "the candidates' own order is always measured too")
    baselines.add_argument("--random_order", action="store_true", help="measure a random order of the candidates")
    baselines.add_argument(
        "--bi_encoder",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "PATH"),
        help="measure the order by the cosine of a sentence-transformers model, in the re-ranker's dtype; repeat the "
        "option for another model",
    )

    fusion = parser.add_argument_group("fusion", "of the re-ranker's scores with the first stage's")
    fusion.add_argument(
        "--fusion",
        type=_weight,
        nargs="*",
        metavar="WEIGHT",
        help="also measure every setting by its standard scores plus WEIGHT times the first stage's standard scores. "
        "Half of the queries choose the best of several weights (without WEIGHT: "
        f"{' '.join(f'{weight:g}' for weight in WEIGHTS)}). --write_plan writes the weight into the plan",
    )

    output = parser.add_argument_group("measurement")
    output.add_argument(
        "--output", type=Path, default=Path("evaluation_output"), help="directory of the report (default: %(default)s)"
    )
    output.add_argument(
        "--recall_at", type=positive, default=10, help="number of first passages in recall@k (default: %(default)s)"
    )
    output.add_argument(
        "--timed_pairs", type=positive, default=1000, help="number of pairs that are timed (default: %(default)s)"
    )
    output.add_argument(
        "--write_plan",
        action="store_true",
        help=f"write {PLAN_NAME}, for budget= and quality=, into the model's directory. Half of the queries choose its "
        "settings, the others are held out. With several --run, the plan is measured on the first one",
    )
    output.add_argument(
        "--calibrate",
        action="store_true",
        help="fit a calibration of each setting's scores on the choosing half, for the plan and normalize='calibrated'",
    )
    return parser


def add_candidates(group: argparse._ArgumentGroup) -> None:
    """Add the options of the candidates, apart from `--data`."""
    group.add_argument("--split", default="test", help="name of the judgements, qrels/SPLIT.tsv (default: %(default)s)")
    group.add_argument(
        "--top_k", type=positive, default=100, help="maximum number of candidates of a query (default: %(default)s)"
    )
    group.add_argument(
        "--queries",
        type=positive,
        metavar="N",
        help="a random sample of N judged queries (default: all)",
    )
    group.add_argument("--query_seed", type=int, default=0, help="seed of the sample (default: %(default)s)")


def add_cascades(group: argparse._ArgumentGroup, required: bool = False) -> None:
    """Add `--cascade`, each a list of stages. `as_cascades` converts them to dicts."""
    group.add_argument(
        "--cascade",
        type=stage,
        nargs="+",
        action="append",
        required=required,
        default=None if required else [],
        metavar="EXIT:SHARE",
        help="stages of a cascade: after EXIT only this fraction of all candidates goes deeper. A cascade ends at the "
        "deepest measured exit. Repeat the option for another cascade",
    )


def as_cascades(parser: argparse.ArgumentParser, given: Sequence[Sequence[tuple[int, float]]]) -> list[dict]:
    """Return {exit: share} of each `--cascade`. End the process if a cascade names an exit twice."""
    for stages in given:
        if len(dict(stages)) < len(stages):
            parser.error(f"--cascade names an exit twice: {stages}")
    return [dict(stages) for stages in given]


def collection_name(directory: Path, split: str) -> str:
    """Return the name of a collection in reports."""
    return f"{directory.resolve().name}/{split}"


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _weight(text: str) -> float:
    """Parse a fusion weight."""
    try:
        return as_weight(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number of at least 0") from error
