"""Scoring candidates at every setting, and what it costs."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from tqdm import tqdm

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.memory import peak_memory
from flagembedding_matryoshka.evaluation.metrics import Run, in_order, per_query
from flagembedding_matryoshka.evaluation.store import Result, Store
from flagembedding_matryoshka.evaluation.weighting import first_stage_run, fuse_runs
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.inference.scoring import Hit, best_first
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import TokenizedPair

PAIRS_AT_ONCE = 16_384


def evaluate(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    settings: Sequence[Setting],
    store: Store,
    timed_pairs: int,
    recall_at: int,
    tokenized: Callable[[], Lists] | None = None,
    fusion: float | None = None,
) -> list[Result]:
    """Measure what the store does not hold yet: the exits of a width in one pass, each cascade in its own. Texts are
    tokenised once for all of them.

    Each is saved as soon as it is known, so that a later call goes on where this one stopped.

    Args:
        timed_pairs: the speed of a setting is that of whole lists with so many pairs together, run for it alone.
        tokenized: returns the result of `tokenize` for the candidates; None calls `tokenize`.
        fusion: the weight of the first stage in fused scores, by which settings rank and cascades drop candidates;
            None ranks by the re-ranker's scores.

    Returns:
        a result for each setting, in order.
    """
    found = {setting: store.load(setting) for setting in settings}
    missing = [setting for setting in settings if found[setting] is None]
    tokenized = tokenized or partial(tokenize, reranker, candidates)
    lists = tokenized() if missing else Lists({}, 0.0)
    sample = timed_sample(candidates, timed_pairs)

    def keep(setting: Setting, run: Run, flops: int) -> None:
        speed, memory = speed_and_memory(reranker, candidates, lists, setting, sample, fusion)
        quality = per_query(candidates, run, recall_at)
        found[setting] = result = Result(setting, flops / len(candidates), speed, memory, quality)
        store.save(result, run)

    for _, width in groupby(missing, key=lambda setting: (setting.compress_layers, setting.compress_ratio)):
        group = list(width)
        exits = [setting for setting in group if not setting.cascade]
        if exits:
            pairs = lists.pairs(list(candidates.passages))
            for setting, run in zip(exits, score_exits(reranker, candidates, lists, exits), strict=True):
                if fusion is not None:
                    run = fuse_runs(candidates, run, [(first_stage_run(candidates), fusion)])
                keep(setting, run, reranker.estimate_flops(pairs, **setting.arguments))
        for setting in group:
            if setting.cascade:
                keep(setting, *cascade_run(reranker, candidates, lists, setting, fusion))
    return [result for setting in settings if (result := found[setting]) is not None]


def evaluate_fused(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    results: Sequence[Result],
    store: Store,
    fusion: float,
    timed_pairs: int,
    recall_at: int,
    tokenized: Callable[[], Lists] | None = None,
) -> list[Result]:
    """Measure the same settings in the order of fused scores.

    The scores of exits are read from `store`. Cascades drop candidates by the fused score, so the model runs again.
    Fused runs and results are saved in the directory `fused/` of the store.

    Args:
        results: of `evaluate`, with the same store.
        fusion: the weight of the first stage. A weight of 0 returns `results`.
        timed_pairs, recall_at, tokenized: as in `evaluate`.

    Returns:
        a result for each item of `results`, in the same order.

    Raises:
        ValueError: as `first_stage_run`.
    """
    if fusion == 0:
        return list(results)
    first_stage = first_stage_run(candidates)
    beside = store.beside("fused", {"fusion": fusion, "first_stage": candidates.first_stage})
    found = {}
    for result in results:
        if not result.setting.cascade:
            run = fuse_runs(candidates, store.run(result.setting), [(first_stage, fusion)])
            found[result.setting] = replace(result, per_query=per_query(candidates, run, recall_at))
            beside.save(found[result.setting], run)
    cascades = [result.setting for result in results if result.setting.cascade]
    measured = evaluate(reranker, candidates, cascades, beside, timed_pairs, recall_at, tokenized, fusion)
    found |= dict(zip(cascades, measured, strict=True))
    return [found[result.setting] for result in results]


@dataclass(frozen=True)
class Lists:
    """All candidates as the re-ranker reads them.

    Attributes:
        inputs: of each query that has candidates, in their order.
        seconds_per_pair: what tokenising took.
    """

    inputs: dict[str, list[TokenizedPair]]
    seconds_per_pair: float

    def pairs(self, queries: Sequence[str]) -> list[TokenizedPair]:
        """Those of some queries, list after list."""
        return [pair for query in queries for pair in self.inputs.get(query, [])]


def tokenize(reranker: MatryoshkaReranker, candidates: Candidates) -> Lists:
    """All lists, tokenised many at a time: a passage that several of these hold is tokenised once."""
    inputs: dict[str, list[TokenizedPair]] = {}
    start = time.perf_counter()
    for queries in candidates.portions(list(candidates.passages), PAIRS_AT_ONCE):
        rest = iter(reranker.tokenize(candidates.pairs(queries)))
        for query in queries:
            inputs[query] = list(islice(rest, len(candidates.passages[query])))
    return Lists(inputs, (time.perf_counter() - start) / len(candidates))


def score_exits(
    reranker: MatryoshkaReranker, candidates: Candidates, lists: Lists, settings: Sequence[Setting]
) -> list[Run]:
    """Runs of settings that differ in their exit alone, from one pass.

    Raises:
        ValueError: if a score is not finite.
    """
    options = settings[0].arguments | {"cutoff_layers": [setting.depth for setting in settings]}
    runs: list[Run] = [{} for _ in settings]
    with tqdm(total=len(candidates), desc=str(settings[-1]), unit="pair", disable=None) as progress:
        for queries in candidates.portions(list(candidates.passages), PAIRS_AT_ONCE):
            pairs = lists.pairs(queries)
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


def cascade_run(
    reranker: MatryoshkaReranker, candidates: Candidates, lists: Lists, setting: Setting, fusion: float | None = None
) -> tuple[Run, int]:
    """A cascade's run, and the operations that it spent, each candidate's as far as it came."""
    rankings: dict[str, list[str]] = {}
    flops = 0
    options = setting.arguments | {"cutoff_layers": [*dict(setting.cascade), setting.depth]}
    with tqdm(total=len(candidates), desc=str(setting), unit="pair", disable=None) as progress:
        for queries in candidates.portions(list(candidates.passages), reranker.batch_size):
            depths: list[int] = []
            for query, hits in zip(
                queries, score_cascade(reranker, candidates, lists, setting, queries, fusion), strict=True
            ):
                rankings[query] = [candidates.passages[query][place] for place in best_first(hits)]
                depths += [hit["cutoff_layer"] for hit in hits]
            pairs = lists.pairs(queries)
            flops += reranker.estimate_flops(pairs, depths, **options)
            progress.update(len(pairs))
    return in_order(rankings), flops


def score_cascade(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    lists: Lists,
    setting: Setting,
    queries: Sequence[str],
    fusion: float | None = None,
) -> list[list[Hit]]:
    """Score the lists of `queries` by `MatryoshkaReranker.score_lists`.

    Args:
        fusion: the weight of the first stage; None is no fusion.
    """
    fused: dict[str, Any] = {}
    if fusion is not None:
        assert candidates.first_stage is not None
        fused = {"fusion": fusion, "first_stage_scores": [candidates.first_stage[query] for query in queries]}
    return reranker.score_lists(
        [lists.inputs[query] for query in queries],
        cascade=dict(setting.cascade),
        show_progress_bar=False,
        **fused,
        **setting.arguments,
    )


def timed_sample(candidates: Candidates, pairs: int) -> list[str]:
    """Queries drawn at random, whose lists have `pairs` pairs together, or few more."""
    queries = [query for query, passages in candidates.passages.items() if passages]
    return next(candidates.portions(random.Random(0).sample(queries, len(queries)), pairs))


def speed_and_memory(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    lists: Lists,
    setting: Setting,
    sample: list[str],
    fusion: float | None = None,
) -> tuple[float, int | None]:
    """Pairs per second from texts to scores, and peak memory in bytes, of the sample's lists, after a first list that
    warms up. What tokenising a pair takes was measured before, for all settings."""

    def work(queries: list[str]) -> None:
        if setting.cascade:
            for portion in candidates.portions(queries, reranker.batch_size):
                score_cascade(reranker, candidates, lists, setting, portion, fusion)
        else:
            reranker.compute_score(lists.pairs(queries), show_progress_bar=False, **setting.arguments)

    work(sample[:1])
    start = time.perf_counter()
    memory = peak_memory(lambda: work(sample), reranker.target_devices)
    pairs = len(lists.pairs(sample))
    return pairs / (time.perf_counter() - start + pairs * lists.seconds_per_pair), memory
