"""Train a plain re-ranker, make it elastic from queries alone, and compare both on held-out queries.

    python examples/elastic.py --base BASE --data DIR --output OUT --exits 8 15 22 30 --use_cpu True --bf16

BASE is a raw language model, which answers Yes or No. DIR is a collection in BEIR's layout with qrels/train.tsv and
qrels/test.tsv. The plain re-ranker learns from the labels of the training queries at its deepest exit alone, the last
of --exits. The elastic one learns all exits from the plain one's scores, without labels. Other arguments go to both
trainings. A step whose output exists is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation.candidates import Candidates, from_bm25, sample_queries
from flagembedding_matryoshka.evaluation.runs import QUALITY, Run, mean, per_query
from flagembedding_matryoshka.evaluation.significance import paired_interval
from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.mining import lists, negatives
from flagembedding_matryoshka.text.collections import read_collection

GROUPS = [
    *("--train_group_size", "8", "--per_device_train_batch_size", "4", "--query_max_len", "64"),
    *("--passage_max_len", "128", "--random_negatives", "0.4", "--lora_rank", "16", "--lora_alpha", "32"),
    *("--logging_steps", "10", "--report_to", "none", "--save_strategy", "no", "--warmup_steps", "20"),
]
WIDTHS = ["--compress_layers", "3", "6", "9", "--compress_ratios", "1", "1", "2", "4"]
LENGTHS = {"query_max_length": 64, "max_length": 192}
CANDIDATES = 30
DEEPEST_LOSS, HALF_LOSS = 0.005, 0.02
"""Largest accepted losses of nDCG@10: of the deepest exit, and of the exit at half depth against the deepest."""


def finetune(output: Path, *arguments: str) -> None:
    """Run the fine-tuning command, unless its output is complete."""
    if not (output / "config.json").exists():
        command = [sys.executable, "-m", "flagembedding_matryoshka.finetune", "--output_dir", str(output)]
        subprocess.run([*command, *arguments], check=True)


def train(options: argparse.Namespace, further: Sequence[str]) -> tuple[Path, Path]:
    """Train both re-rankers and return their directories."""
    unlabelled, labelled, adapters, plain, elastic = (
        options.output / name for name in ("lists.jsonl", "rows.jsonl", "adapters", "plain", "elastic")
    )
    exits = [str(layer) for layer in options.exits]
    for path, module in ((labelled, negatives), (unlabelled, lists)):
        if not path.exists():
            module.main(["--data", str(options.data), "--split", "train", "--output", str(path)])
    finetune(
        adapters,
        *("--model_name_or_path", options.base, "--train_data", str(labelled), "--train_method", "normal"),
        *("--exits", exits[-1], "--max_steps", str(options.steps[0]), "--learning_rate", "7e-4", *GROUPS, *further),
    )
    if not (plain / "config.json").exists():
        MatryoshkaReranker(adapters, dtype="float32", devices="cpu").export(str(plain))
    finetune(
        elastic,
        *("--model_name_or_path", str(plain), "--train_data", str(unlabelled), "--train_method", "self_distill"),
        *("--exits", *exits, *WIDTHS, "--max_steps", str(options.steps[1])),
        *("--learning_rate", "3e-4", *GROUPS, *further),
    )
    return plain, elastic


def qualities(model: Path, candidates: Candidates, dtype: str) -> dict[int, list[float]]:
    """Return the nDCG@10 of each query at each exit of a model."""
    reranker = MatryoshkaReranker(model, dtype=dtype, **LENGTHS)
    queries = list(candidates.passages)
    layers = reranker.config.exit_layers
    scores = reranker.compute_score(candidates.pairs(queries), cutoff_layers=layers)
    found = {}
    for layer, values in zip(layers, [scores] if len(layers) == 1 else scores, strict=True):
        rest = iter(values)
        scored: Run = {query: {name: next(rest) for name in candidates.passages[query]} for query in queries}
        found[layer] = per_query(candidates, scored, 10)[QUALITY]
    return found


def compare(plain: dict[int, list[float]], elastic: dict[int, list[float]]) -> list[dict[str, object]]:
    """Return a row for the plain re-ranker, and one for each exit of the elastic one.

    Changes of the deepest exit are against the plain re-ranker, those of the others against the elastic one's deepest
    exit, each with its 95 % interval.
    """
    ((deepest, original),) = plain.items()
    rows: list[dict[str, object]] = [{"model": "plain", "exit": deepest, QUALITY: mean(original)}]
    for layer, values in elastic.items():
        reference = original if layer == deepest else elastic[deepest]
        change, interval = mean(values) - mean(reference), paired_interval(values, reference)
        rows.append({"model": "elastic", "exit": layer, QUALITY: mean(values), "change": change, "interval": interval})
    return rows


def losses(rows: Sequence[dict[str, object]]) -> tuple[float, float]:
    """Return the loss of the deepest exit against the plain re-ranker, and that of the exit nearest to half depth."""
    changes = {row["exit"]: -float(str(row["change"])) for row in rows if row["model"] == "elastic"}
    deepest = max(changes)
    return changes[deepest], changes[min(changes, key=lambda layer: abs(layer - deepest / 2))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a raw language model: name, path or GGUF file")
    parser.add_argument("--data", type=Path, required=True, help="a collection in BEIR's layout")
    parser.add_argument("--output", type=Path, required=True, help="directory of all files")
    parser.add_argument("--exits", type=int, nargs="+", required=True, help="the exits, the deepest last")
    parser.add_argument("--steps", type=int, nargs=2, default=(400, 150), help="steps of the trainings (400 150)")
    parser.add_argument("--queries", type=int, help="number of test queries to draw (default: all)")
    parser.add_argument("--dtype", default="auto", help="dtype of the comparison (default: %(default)s)")
    options, further = parser.parse_known_args(arguments)
    plain, elastic = train(options, further)
    collection = sample_queries(read_collection(options.data, "test"), options.queries, 0)
    candidates = from_bm25(collection, CANDIDATES)
    rows = compare(*(qualities(model, candidates, options.dtype) for model in (plain, elastic)))
    write_text(options.output / "comparison.json", json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))
    deepest, half = losses(rows)
    print(
        f"deepest exit: loss {deepest:.4f}, accepted {DEEPEST_LOSS}; half depth: loss {half:.4f}, accepted {HALF_LOSS}"
    )


if __name__ == "__main__":
    main()
