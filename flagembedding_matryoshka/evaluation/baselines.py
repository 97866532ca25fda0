"""Baselines: the candidates' own order, a random order, and the order by a bi-encoder's cosine."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.measure import timed_sample
from flagembedding_matryoshka.evaluation.runs import Run, in_order, per_query
from flagembedding_matryoshka.mining.retrievers import BiEncoder

BI_ENCODER_BATCH = 8
"""Passages per batch, longest first. Small batches have little padding, whose operations count too."""


@dataclass(frozen=True)
class Baseline:
    """Quality and cost of an order of the candidates.

    Attributes:
        name: name of the order in reports.
        per_query: measure to its value for each query, in the order of the candidates.
        flops_per_pair, pairs_per_second: cost on the timed sample; None for an order without cost.
        run: scores for fusion with other scores; None if there is only an order.
    """

    name: str
    per_query: dict[str, list[float]]
    flops_per_pair: float | None = None
    pairs_per_second: float | None = None
    run: Run | None = None


def as_given(candidates: Candidates, recall_at: int) -> Baseline:
    """Measure the candidates' own order."""
    return Baseline(f"{candidates.source}, as given", per_query(candidates, in_order(candidates.passages), recall_at))


def at_random(candidates: Candidates, recall_at: int) -> Baseline:
    """Measure a random order. It is the same in every call."""
    draw = random.Random(0)
    shuffled = {query: draw.sample(ids, len(ids)) for query, ids in candidates.passages.items()}
    return Baseline("random order", per_query(candidates, in_order(shuffled), recall_at))


def by_bi_encoder(
    candidates: Candidates,
    name: str,
    path: str,
    timed_pairs: int,
    recall_at: int,
    device: str,
    dtype: torch.dtype,
    allow_pickle: bool = False,
) -> Baseline:
    """Measure the order by the cosine of query and passage. Passages are encoded list by list, as by a re-ranker.

    Args:
        candidates: the candidates.
        name: name of the order in reports.
        path: name or path of a model for sentence-transformers.
        timed_pairs: the cost is measured on whole lists with at least this number of pairs.
        recall_at: number of first passages in recall.
        device: device of the model.
        dtype: dtype of the model; the re-ranker's, so that speeds can be compared.
        allow_pickle: as in `BiEncoder`.

    Raises:
        ValueError: if a vector is not finite, or weights are pickled and `allow_pickle` is False.
    """
    encoder = BiEncoder(
        path,
        batch_size=BI_ENCODER_BATCH,
        device=device,
        use_fp16=dtype == torch.float16,
        use_bf16=dtype == torch.bfloat16,
        allow_pickle=allow_pickle,
    )

    def score(query: str) -> dict[str, float]:
        ids = candidates.passages[query]
        if not ids:
            return {}
        cosines = encoder.passages(candidates.texts(query)) @ encoder.queries([candidates.collection.queries[query]]).T
        return dict(zip(ids, cosines[:, 0].tolist(), strict=True))

    run = {query: score(query) for query in tqdm(candidates.passages, desc=name, unit="query", disable=None)}
    sample = timed_sample(candidates, timed_pairs)
    pairs = len(candidates.pairs(sample))
    start = time.perf_counter()
    for query in sample:
        score(query)
    speed = pairs / (time.perf_counter() - start)
    # The counter sees the matrix products of this attention kernel only.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for query in sample:
            score(query)
    return Baseline(name, per_query(candidates, run, recall_at), counter.get_total_flops() / pairs, speed, run)
