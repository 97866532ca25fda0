"""The command line of an evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path

from flagembedding_matryoshka.evaluation.arguments import add_candidates, add_cascades, add_dtype, add_scoring, positive
from flagembedding_matryoshka.evaluation.weighting import WEIGHTS
from flagembedding_matryoshka.inference.arguments import program
from flagembedding_matryoshka.inference.fusion import as_weight
from flagembedding_matryoshka.inference.plan import PLAN_NAME

BM25 = "bm25"
DESCRIPTION = """Measure quality and cost of a re-ranker's depths, widths and cascades on a collection in BEIR layout.

python -m flagembedding_matryoshka.evaluation --model DIR --data DIR --cutoff_layers 8 16 24 \
    --compress_layers 8 --compress_ratios 1 2 4 --cascade 8:0.5 16:0.2 --output DIR --write_plan
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("flagembedding_matryoshka.evaluation"),
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("what is ranked")
    data.add_argument("--data", type=Path, required=True, help="corpus.jsonl, queries.jsonl and qrels/ lie here")
    data.add_argument(
        "--run",
        action="append",
        metavar="FILE",
        help="re-rank the candidates of this TREC run instead of BM25's; give it again for another first stage, which "
        f"stands beside it ({BM25} is BM25's)",
    )
    add_candidates(data)

    model = parser.add_argument_group("the re-ranker", "as in MatryoshkaReranker")
    model.add_argument("--model", required=True, help="its name, such as smollm2, or path")
    model.add_argument("--peft_path", nargs="+", default=[], help="adapters to merge or attach, in order")
    model.add_argument("--start_layer", type=int, help="of a raw checkpoint (default: 4)")
    model.add_argument("--layer_sep", type=int, help="of a raw checkpoint (default: 1)")
    model.add_argument("--template", help="what stands around query and passage, by name or as a JSON file")
    add_dtype(model)
    add_scoring(model)

    settings = parser.add_argument_group("settings", "the full network is always measured beside them")
    settings.add_argument("--cutoff_layers", type=int, nargs="+", help="default: every exit")
    settings.add_argument("--compress_layers", type=int, nargs="+", default=[], help="for all ratios above 1")
    settings.add_argument("--compress_ratios", type=int, nargs="+", default=[1], help="default: 1, off")
    add_cascades(settings)
    settings.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[],
        help="also what the model's plan chooses within these shares of the full network's operations",
    )

    baselines = parser.add_argument_group("baselines", "the candidates' own order is always measured beside them")
    baselines.add_argument("--random_order", action="store_true", help="a random order of the candidates")
    baselines.add_argument(
        "--bi_encoder",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "PATH"),
        help="the order by cosine of a sentence-transformers model, in the same dtype; give it again for another",
    )

    fusion = parser.add_argument_group("fusion", "with the first stage's scores of the candidates")
    fusion.add_argument(
        "--fusion",
        type=_weight,
        nargs="*",
        metavar="WEIGHT",
        help="also measure every setting by its standard scores plus WEIGHT times the first stage's standard scores. "
        "Half of the queries choose among several weights (without WEIGHT: "
        f"{' '.join(f'{weight:g}' for weight in WEIGHTS)}). --write_plan writes the choice into the plan",
    )

    output = parser.add_argument_group("measuring")
    output.add_argument("--output", type=Path, default=Path("evaluation_output"), help="default: %(default)s")
    output.add_argument("--recall_at", type=positive, default=10, help="default: %(default)s")
    output.add_argument("--timed_pairs", type=positive, default=1000, help="for the speed (default: %(default)s)")
    output.add_argument(
        "--write_plan",
        action="store_true",
        help=f"write {PLAN_NAME} beside the model, for its budget= and quality=, by the candidates of the first --run: "
        "half of the queries choose, the others report",
    )
    output.add_argument(
        "--calibrate",
        action="store_true",
        help="fit what scores mean at each setting to the same half, for the plan and its normalize='calibrated'",
    )
    return parser


def _weight(text: str) -> float:
    """Parse a fusion weight."""
    try:
        return as_weight(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number of at least 0") from error
