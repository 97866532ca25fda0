"""What the benchmarks have in common."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flagembedding_matryoshka import SMOLLM2
from flagembedding_matryoshka.evaluation.candidates import Candidates, from_bm25, sample_queries
from flagembedding_matryoshka.evaluation.results import machine
from flagembedding_matryoshka.evaluation.runs import QUALITY, in_order, mean, per_query
from flagembedding_matryoshka.evaluation.significance import paired_interval, paired_p_value
from flagembedding_matryoshka.models.onednn import OneDnnLinear, use_onednn
from flagembedding_matryoshka.text.collections import read_collection

LENGTHS = {"query_max_length": 64, "max_length": 192}
"""The demo's."""
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def matrix_flops_per_second(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int] | None = None, repeats: int = 20
) -> float:
    """What a product of matrices (rows, inner) and (inner, columns) reaches at its fastest.

    On a CPU the fastest of the products at hand is taken: torch's, and oneDNN's with the second matrix in its order.

    Args:
        shape: rows, inner and columns; None is a big square.
    """
    rows, inner, columns = shape or (MATRIX_SIZE[torch.device(device).type],) * 3
    left, right = (
        torch.randn(rows, inner, device=device).to(dtype),
        torch.randn(inner, columns, device=device).to(dtype),
    )
    products: list[Callable[[], Any]] = [lambda: left @ right]
    linear = nn.Sequential(nn.Linear(inner, columns, bias=False, device=device, dtype=dtype))
    use_onednn(linear)
    if isinstance(linear[0], OneDnnLinear):
        products.append(lambda: linear(left))
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            for compute in products:
                synchronize(device)
                start = time.perf_counter()
                compute()
                synchronize(device)
                seconds.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / min(seconds)


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on beside the code; a load above 0 at the start says that others were computing."""
    return machine([device]) | {"load_average": os.getloadavg()[0]}


def ranking_parser(about: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of benchmarks that rank BM25's candidates of a collection."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="default: %(default)s")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a collection in BEIR's layout")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--queries", type=int, help="the number of queries to draw; default: all")
    parser.add_argument("--dtype", default="auto", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    return parser


def read_candidates(options: argparse.Namespace, count: int) -> Candidates:
    """Return BM25's first `count` passages for the queries that options of `ranking_parser` choose."""
    return from_bm25(sample_queries(read_collection(options.data, options.split), options.queries, 0), count)


def quality(candidates: Candidates, rankings: Mapping[str, Sequence[str]]) -> list[float]:
    """Return the nDCG@10 of each query, of rankings by query id."""
    return per_query(candidates, in_order(rankings), 10)[QUALITY]


def change(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Return the mean difference of two ways, its 95 % interval and its p-value."""
    return {
        "change": round(mean(values) - mean(reference), 4),
        "interval": [round(end, 4) for end in paired_interval(values, reference) or ()],
        "p": round(paired_p_value(values, reference), 3),
    }
