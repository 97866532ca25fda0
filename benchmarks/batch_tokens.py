"""Pairs per second of the re-ranker with several numbers of tokens in a batch.

    python -m benchmarks.batch_tokens --output batch_tokens.json

Each shape's checkpoint, with random weights, scores the same pairs from texts to scores, at full width and at ratio 4
after a sixth of the layers. Numbers of tokens take turns, round after round, after one round that warms up. `lost` is
how much slower the re-ranker's own number is than the fastest one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import environment
from benchmarks.scoring.checkpoints import SHAPES, config_of, write_checkpoint
from benchmarks.scoring.settings import Workload
from benchmarks.scoring.texts import random_pairs, words_of
from benchmarks.scoring.timing import take_turns
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.gguf import SMOLLM2_BASE_NAME
from flagembedding_matryoshka.checkpoints.loading import load_tokenizer

RATIOS = (1, 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batch_tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes = ["4x128", "16x512", "smollm2-135m", "24x1024"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes, help="default: %(default)s")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="in a batch; default: %(default)s"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="default: all")
    parser.add_argument("--pairs", type=int, default=60, help="scored per call; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args()

    report: dict[str, Any] = {"benchmark": "batch_tokens", "environment": environment("cpu"), "results": []}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for shape in args.shapes:
            for dtype in args.dtypes:
                for result in measure(shape, dtype, args):
                    report["results"].append({"threads": threads, "shape": shape, "dtype": dtype, **result})
                    print(report["results"][-1])
    line = json.dumps(report)
    if args.output:
        args.output.write_text(line + "\n")
    print(line)


def measure(shape: str, dtype: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield for each ratio the pairs per second by tokens of a batch, and what the re-ranker's own number loses."""
    tokenizer = load_tokenizer(SMOLLM2_BASE_NAME)
    with tempfile.TemporaryDirectory() as path:
        write_checkpoint(config_of(shape, len(tokenizer)), tokenizer, path, getattr(torch, dtype))
        reranker = MatryoshkaReranker(path, dtype=dtype, devices="cpu")
    pairs = random_pairs(words_of(tokenizer), args.pairs, random.Random(0))
    own, layers = reranker.max_tokens_per_batch, [max(1, reranker.config.num_hidden_layers // 6)]
    for ratio in RATIOS:
        score = partial(
            reranker.compute_score,
            pairs,
            compress_layers=layers,
            compress_ratio=ratio,
            show_progress_bar=False,
        )
        timed = [
            Workload(str(tokens), partial(score, max_tokens_per_batch=tokens), len(pairs), None)
            for tokens in sorted({own, *args.tokens})
        ]
        seconds = {int(name): statistics.median(each) for name, each in take_turns(timed, args.rounds, "cpu").items()}
        yield {
            "ratio": ratio,
            "own": own,
            "lost": seconds[own] / min(seconds.values()) - 1,
            "pairs_per_s": {tokens: len(pairs) / each for tokens, each in seconds.items()},
        }


if __name__ == "__main__":
    main()
