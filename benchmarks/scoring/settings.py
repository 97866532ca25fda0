"""Workloads that are timed: the plain cross-encoder, and this package in every setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.scoring.plain import PlainCrossEncoder
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.models.quantization import Quantization

CANDIDATES, TOP = 100, 10
TOLERANCE = 1e-4
PLAIN, PLAIN_SHARED = "plain cross-encoder", "plain, shared query"


@dataclass(frozen=True)
class Workload:
    """A call that is timed.

    Attributes:
        score: the call.
        pairs: number of pairs that it scores.
        flops: floating-point operations of the call; None if they are not counted.
        against: name of the workload that its speedup is relative to.
    """

    name: str
    score: Callable[[], Any]
    pairs: int
    flops: int | None
    against: str = PLAIN


def settings_of(ours: MatryoshkaReranker, pairs: list[tuple[str, str]], lists: dict[str, list[str]]) -> list[Workload]:
    """The plain cross-encoder, then ours: depth and width, a query that candidates share, dropping candidates."""
    layers = ours.config.num_hidden_layers
    quarter = layers // 4
    half = 2 * quarter
    plain = PlainCrossEncoder(ours)
    apart = torch.tensor(plain.compute_score(pairs)) - torch.tensor(ours.compute_score(pairs))
    if ours.model.dtype == torch.float32 and not apart.abs().max() <= TOLERANCE:
        raise RuntimeError(f"ours and the plain cross-encoder differ by up to {apart.abs().max():.2g} in their scores")

    def width(ratio: int, *compress_layers: int) -> dict[str, Any]:
        return {"compress_layers": compress_layers, "compress_ratio": ratio}

    def scoring(name: str, **options: Any) -> Workload:
        flops = ours.estimate_flops(pairs, **options)
        return Workload(name, lambda: ours.compute_score(pairs, show_progress_bar=False, **options), len(pairs), flops)

    queries, documents = list(lists), list(lists.values())
    shared = [(query, text) for query, texts in lists.items() for text in texts]
    cascade = {quarter: 0.3, half: TOP / CANDIDATES}
    settings = [
        Workload(PLAIN, lambda: plain.compute_score(pairs), len(pairs), None),
        scoring("full depth"),
        scoring("half depth", cutoff_layers=[half]),
        scoring("full depth, ratio 2", **width(2, quarter)),
        scoring("full depth, ratio 4", **width(4, quarter)),
        scoring("half depth, ratio 2", cutoff_layers=[half], **width(2, quarter)),
        scoring("quarter depth", cutoff_layers=[quarter]),
    ]
    if not lists:
        return settings
    return [
        *settings,
        Workload(PLAIN_SHARED, lambda: plain.compute_score(shared), len(shared), None, PLAIN_SHARED),
        Workload(
            "shared query",
            lambda: ours.compute_score(shared, show_progress_bar=False),
            len(shared),
            ours.estimate_flops(shared),
            PLAIN_SHARED,
        ),
        Workload(
            f"cascade to {TOP} of {CANDIDATES}",
            lambda: ours.rank_batch(queries, documents, top_k=TOP, cascade=cascade),
            len(shared),
            None,
            PLAIN_SHARED,
        ),
    ]


def quantizations(ours: MatryoshkaReranker) -> list[Quantization]:
    """Those that run here."""
    runs: list[Quantization] = []
    if ours.model.dtype == torch.float32 and ours.model.device.type == "cpu":
        runs.append("int8")
    if find_spec("bitsandbytes") is not None:
        runs.append("nf4")
    return runs
