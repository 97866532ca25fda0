"""Orders of the candidates to compare a re-ranker with: as given, at random, by a bi-encoder's cosine."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.measuring import timed_sample
from flagembedding_matryoshka.evaluation.metrics import Run, in_order, per_query

BI_ENCODER_BATCH = 8
"""Passages of a list, longest first: small batches pad little, and their padding counts as operations."""


@dataclass(frozen=True)
class Baseline:
    """An order, and what it costs.

    Attributes:
        name: whose it is, in words.
        per_query: measure to its value for each query, in the order of the candidates.
        flops_per_pair, pairs_per_second: of the timed sample; None for an order that costs nothing.
        run: scores, which can be fused with a re-ranker's; None for an order alone.
    """

    name: str
    per_query: dict[str, list[float]]
    flops_per_pair: float | None = None
    pairs_per_second: float | None = None
    run: Run | None = None


def as_given(candidates: Candidates, recall_at: int) -> Baseline:
    """The candidates' own order."""
    return Baseline(f"{candidates.source}, as given", per_query(candidates, in_order(candidates.passages), recall_at))


def at_random(candidates: Candidates, recall_at: int) -> Baseline:
    """One random order, always the same."""
    draw = random.Random(0)
    shuffled = {query: draw.sample(ids, len(ids)) for query, ids in candidates.passages.items()}
    return Baseline("random order", per_query(candidates, in_order(shuffled), recall_at))


def by_bi_encoder(
    candidates: Candidates, name: str, path: str, timed_pairs: int, recall_at: int, device: str, dtype: torch.dtype
) -> Baseline:
    """By the cosine of query and passage. Passages are encoded list by list, as a re-ranker reads them.

    Args:
        path: what sentence-transformers loads.
        dtype: what it computes in; to compare speeds, the re-ranker's.

    Raises:
        ValueError: if the model gives vectors that are not finite.
    """
    # What fine-tuning imports takes seconds: only who asks for it waits.
    from flagembedding_matryoshka.mining.retrievers import BiEncoder

    encoder = BiEncoder(
        path,
        batch_size=BI_ENCODER_BATCH,
        device=device,
        use_fp16=dtype == torch.float16,
        use_bf16=dtype == torch.bfloat16,
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
    # Of attention's kernels only this one is made of products that the counter sees.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for query in sample:
            score(query)
    return Baseline(name, per_query(candidates, run, recall_at), counter.get_total_flops() / pairs, speed, run)
