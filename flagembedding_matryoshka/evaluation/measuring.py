"""Scoring candidates at every setting, and what it costs."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from itertools import groupby

import torch
from tqdm import tqdm

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.memory import peak_memory
from flagembedding_matryoshka.evaluation.metrics import Run, in_order, per_query
from flagembedding_matryoshka.evaluation.store import Result, Store
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.setting import Setting

PAIRS_AT_ONCE = 16_384


def evaluate(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    settings: Sequence[Setting],
    store: Store,
    timed_pairs: int,
    recall_at: int,
) -> list[Result]:
    """Measure what the store does not hold yet: the exits of a width in one pass, each cascade in its own.

    Each is saved as soon as it is known, so that a later call goes on where this one stopped.

    Args:
        timed_pairs: the speed of a setting is that of whole lists with so many pairs together, run for it alone.

    Returns:
        a result for each setting, in order.
    """
    found = {setting: store.load(setting) for setting in settings}
    sample = timed_sample(candidates, timed_pairs)

    def keep(setting: Setting, run: Run, flops: int) -> None:
        speed, memory = speed_and_memory(reranker, candidates, setting, sample)
        quality = per_query(candidates, run, recall_at)
        found[setting] = result = Result(setting, flops / len(candidates), speed, memory, quality)
        store.save(result, run)

    missing = [setting for setting in settings if found[setting] is None]
    for _, width in groupby(missing, key=lambda setting: (setting.compress_layers, setting.compress_ratio)):
        group = list(width)
        exits = [setting for setting in group if not setting.cascade]
        if exits:
            pairs = candidates.pairs(list(candidates.passages))
            for setting, run in zip(exits, score_exits(reranker, candidates, exits), strict=True):
                keep(setting, run, reranker.estimate_flops(pairs, **setting.arguments))
        for setting in group:
            if setting.cascade:
                keep(setting, *cascade_run(reranker, candidates, setting))
    return [result for setting in settings if (result := found[setting]) is not None]


def score_exits(reranker: MatryoshkaReranker, candidates: Candidates, settings: Sequence[Setting]) -> list[Run]:
    """Runs of settings that differ in their exit alone, from one pass.

    Raises:
        ValueError: if a score is not finite.
    """
    options = settings[0].arguments | {"cutoff_layers": [setting.depth for setting in settings]}
    runs: list[Run] = [{} for _ in settings]
    with tqdm(total=len(candidates), desc=str(settings[-1]), unit="pair", disable=None) as progress:
        for queries in candidates.portions(list(candidates.passages), PAIRS_AT_ONCE):
            pairs = candidates.pairs(queries)
            scores = torch.tensor(reranker.compute_score(pairs, show_progress_bar=False, **options))
            for setting, run, row in zip(settings, runs, scores.reshape(len(settings), -1).tolist(), strict=True):
                rest = iter(row)
                for query in queries:
                    run[query] = {passage: next(rest) for passage in candidates.passages[query]}
                    for passage, score in run[query].items():
                        if not math.isfinite(score):
                            raise ValueError(f"{setting}: the score of query {query!r}, passage {passage!r} is {score}")
            progress.update(len(pairs))
    return runs


def cascade_run(reranker: MatryoshkaReranker, candidates: Candidates, setting: Setting) -> tuple[Run, int]:
    """A cascade's run, and the operations that it spent, each candidate's as far as it came."""
    rankings: dict[str, list[str]] = {}
    flops = 0
    options = setting.arguments | {"cutoff_layers": [*dict(setting.cascade), setting.depth]}
    with tqdm(total=len(candidates), desc=str(setting), unit="pair", disable=None) as progress:
        for queries in candidates.portions(list(candidates.passages), reranker.batch_size):
            pairs, depths = [], []
            for query, ranked in zip(queries, rank(reranker, candidates, setting, queries), strict=True):
                ids, texts = candidates.passages[query], candidates.texts(query)
                rankings[query] = [ids[item["corpus_id"]] for item in ranked]
                pairs += [(candidates.collection.queries[query], texts[item["corpus_id"]]) for item in ranked]
                depths += [item["cutoff_layer"] for item in ranked]
            flops += reranker.estimate_flops(pairs, depths, **options)
            progress.update(len(pairs))
    return in_order(rankings), flops


def rank(
    reranker: MatryoshkaReranker, candidates: Candidates, setting: Setting, queries: Sequence[str]
) -> list[list[dict]]:
    """`MatryoshkaReranker.rank_batch` of some queries' lists."""
    return reranker.rank_batch(
        [candidates.collection.queries[query] for query in queries],
        [candidates.texts(query) for query in queries],
        cascade=dict(setting.cascade),
        **setting.arguments,
    )


def timed_sample(candidates: Candidates, pairs: int) -> list[str]:
    """Queries drawn at random, whose lists have `pairs` pairs together, or few more."""
    queries = [query for query, passages in candidates.passages.items() if passages]
    return next(candidates.portions(random.Random(0).sample(queries, len(queries)), pairs))


def speed_and_memory(
    reranker: MatryoshkaReranker, candidates: Candidates, setting: Setting, sample: list[str]
) -> tuple[float, int | None]:
    """Pairs per second, and peak memory in bytes, of the sample's lists, after a first list that warms up."""

    def work(queries: list[str]) -> None:
        if setting.cascade:
            for portion in candidates.portions(queries, reranker.batch_size):
                rank(reranker, candidates, setting, portion)
        else:
            reranker.compute_score(candidates.pairs(queries), show_progress_bar=False, **setting.arguments)

    work(sample[:1])
    start = time.perf_counter()
    memory = peak_memory(lambda: work(sample), reranker.target_devices)
    return len(candidates.pairs(sample)) / (time.perf_counter() - start), memory
