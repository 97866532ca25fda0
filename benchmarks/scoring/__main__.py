"""Pairs per second of the re-ranker at several depths and widths, against a plain cross-encoder of the same shape.

    python -m benchmarks.scoring --output scoring.json --figure scoring.png

The plain cross-encoder is what one gets from transformers: a Mistral with one output, padded batches of pairs that are
sorted by length, transformers' scaled-dot-product attention, full depth. All sides score the same texts with the same
tokenizer and the same random weights, from strings to floats; full depths must agree in their scores before anything is
timed. Settings take turns, round after round, after one round that warms up.

`speedup` is how many times as fast as the plain cross-encoder a setting ran, median over rounds. `flops_share` is its
arithmetic as a share of our full depth's, `time_share` its time as a share of that one's time: what is configured is
what is saved if they agree. `share_of_matrix_peak` is arithmetic per second against a large matrix product's.
Random weights say nothing of quality: what fewer bits and dropping candidates cost in agreement with the full ranking
is measured with the shipped re-ranker on BM25's first 100 docstrings for held-out summary lines. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import environment
from benchmarks.scoring.agreement import agreement
from benchmarks.scoring.checkpoints import SHAPES
from benchmarks.scoring.measurements import measure_shape
from benchmarks.scoring.report import plot, print_table
from flagembedding_matryoshka.checkpoints.gguf import SMOLLM2_BASE_NAME

ON_A_CPU = ["4x128", "16x512", "24x1024"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoring",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=ON_A_CPU, help="default: %(default)s")
    parser.add_argument("--tokenizer", default=SMOLLM2_BASE_NAME, help="default: the shipped re-ranker's base's")
    parser.add_argument("--pairs", type=int, default=100, help="scored per call; default: %(default)s")
    parser.add_argument("--pairs_only", action="store_true", help="leave out lists of candidates for one query")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=10, help="of the agreement; default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="fuse the layers' token-wise parts")
    parser.add_argument("--output", type=Path, help="file to write the JSON to as well")
    parser.add_argument("--figure", type=Path, help="file to draw the speedups into")
    args = parser.parse_args()

    report: dict[str, Any] = {"benchmark": "scoring", "environment": environment(args.device), "shapes": []}
    for name in args.shapes:
        report["shapes"].append(measure_shape(name, args))
        print_table(report["shapes"][-1])
        if args.output:
            args.output.write_text(json.dumps(report) + "\n")
    if args.queries:
        report["agreement"] = agreement(args.queries)
        print("\nagreement with the full ranking, the shipped base on real text:")
        for row in report["agreement"]:
            print(f"{row['setting']:24} nDCG@10 {row['nDCG@10']:.3f}  top 10 in common {row['overlap_of_top_10']:.2f}")
    line = json.dumps(report)
    if args.output:
        args.output.write_text(line + "\n")
    if args.figure:
        plot(report["shapes"], args.figure)
    print(line)


if __name__ == "__main__":
    main()
