"""Measurement of settings: quality, floating-point operations, speed and peak memory."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.results import Result, Store
from flagembedding_matryoshka.evaluation.runs import Run, first_stage_run, fuse_runs, in_order, per_query
from flagembedding_matryoshka.inference.memory import return_freed_memory
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.inference.scoring import Hit, best_first
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import TokenizedPair

PAIRS_AT_ONCE = 16_384
"""Number of pairs of a call of `tokenize` or `compute_score`."""
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def full_network(config: CostWiseConfig) -> Setting:
    """Return the deepest exit at full width, the reference of all comparisons."""
    return Setting((config.exit_layers[-1],))


def sort_by_width(settings: Iterable[Setting]) -> list[Setting]:
    """Return the settings without repetition. Settings of a width are neighbours, so that one pass scores them."""
    return sorted(dict.fromkeys(settings), key=attrgetter("width"))


def grid(
    config: CostWiseConfig,
    cutoff_layers: Sequence[int] | None = None,
    compress_layers: Sequence[int] = (),
    compress_ratios: Iterable[int] = (1,),
    cascades: Iterable[Mapping[int, float]] = (),
    store_layers: Collection[int] = (),
) -> list[Setting]:
    """Return every cutoff layer, and every cascade, at every ratio, without a store layer and with each one.

    The full network, all cutoff layers at full width and the exits of cascades are always included, because the same
    passes score them. Exits before the first compress layer of a ratio, and up to a store layer, are left out. With a
    store layer, passages are compressed after it alone.

    Args:
        config: configuration of the model.
        cutoff_layers: exits; None is all exits. Cascades end at the deepest one.
        compress_layers: layers after which ratios above 1 compress.
        compress_ratios: compression ratios.
        cascades: {exit: share of all candidates that goes deeper}.
        store_layers: numbers of layers in which passages run apart from their queries.

    Raises:
        ValueError: if the model has no such exit or layer, a ratio has no layer to compress after, or no cutoff layer
            lies above a store layer.
    """
    cutoffs = config.exit_layers if cutoff_layers is None else list(cutoff_layers)
    sorted_cascades = [tuple(sorted(cascade.items())) for cascade in cascades]
    exits = {*cutoffs, *(layer for cascade in sorted_cascades for layer, _ in cascade)}
    settings = []
    ratios = sorted({1, *compress_ratios})
    widths = [(0, compress_layers, ratio) for ratio in ratios if ratio == 1 or compress_layers or not store_layers]
    widths += [(layer, [layer], ratio) for layer in sorted(set(store_layers) - {0}) for ratio in ratios]
    for store_layer, layers, ratio in widths:
        above = [depth for depth in cutoffs if depth > store_layer]
        if not above:
            raise ValueError(f"store_layers has {store_layer}, but none of the cutoff layers {cutoffs} lies above it.")
        width = Setting.resolve(config, above, layers, ratio, store_layer=store_layer)
        after = width.compress_layers if ratio > 1 else ()
        first = min(after, default=store_layer)
        plain = exits if ratio > 1 or store_layer else exits | {full_network(config).depth}
        settings += [
            Setting((depth,), after, ratio, store_layer=store_layer) for depth in sorted(plain) if depth > first
        ]
        settings += [
            Setting((width.depth,), after, ratio, cascade, store_layer)
            for cascade in sorted_cascades
            if width.depth > first and all(layer > store_layer for layer, _ in cascade)
        ]
    for setting in settings:
        setting.check(config)
    return list(dict.fromkeys(settings))


def measure_settings(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    settings: Sequence[Setting],
    store: Store,
    timed_pairs: int,
    recall_at: int,
    tokenized: Callable[[], TokenizedLists] | None = None,
    fusion: float | None = None,
) -> list[Result]:
    """Measure the settings whose results are not in the store.

    One pass scores all exits of a width; each cascade has its own pass. Texts are tokenised once. Each result is saved
    as soon as it is measured, so that a later call resumes after it.

    Args:
        reranker: the re-ranker.
        candidates: the candidates.
        settings: settings, those of a width as neighbours.
        store: the results.
        timed_pairs: the speed is measured on whole lists with at least this number of pairs.
        recall_at: number of first passages in recall.
        tokenized: function that returns the result of `tokenize` for the candidates; None calls `tokenize`.
        fusion: the weight of the first stage in fused scores, by which settings rank and cascades drop candidates;
            None ranks by the re-ranker's scores.

    Returns:
        A result for each setting, in order.
    """
    found = {setting: store.load(setting) for setting in settings}
    missing = [setting for setting in settings if found[setting] is None]
    tokenized = tokenized or partial(tokenize, reranker, candidates)
    lists = tokenized() if missing else TokenizedLists({}, 0.0)
    sample = timed_sample(candidates, timed_pairs)

    def keep(setting: Setting, run: Run, flops: int) -> None:
        speed, memory = speed_and_memory(reranker, candidates, lists, setting, sample, fusion)
        quality = per_query(candidates, run, recall_at)
        found[setting] = result = Result(setting, flops / len(candidates), speed, memory, quality)
        store.save(result, run)

    for _, width in groupby(missing, key=attrgetter("width")):
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
                keep(setting, *run_cascade(reranker, candidates, lists, setting, fusion))
    return [result for setting in settings if (result := found[setting]) is not None]


def measure_fused_settings(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    results: Sequence[Result],
    store: Store,
    fusion: float,
    timed_pairs: int,
    recall_at: int,
    tokenized: Callable[[], TokenizedLists] | None = None,
) -> list[Result]:
    """Measure the same settings in the order of fused scores.

    The scores of exits are read from `store`. Cascades drop candidates by the fused score, so the model runs again.
    Fused runs and results are saved in the directory `fused/` of the store.

    Args:
        reranker: the re-ranker.
        candidates: the candidates.
        results: results of `measure_settings` with the same store.
        store: the store.
        fusion: the weight of the first stage. A weight of 0 returns `results`.
        timed_pairs, recall_at, tokenized: as in `measure_settings`.

    Returns:
        A result for each item of `results`, in the same order.

    Raises:
        ValueError: as `first_stage_run`.
    """
    if fusion == 0:
        return list(results)
    first_stage = first_stage_run(candidates)
    fused_store = store.substore("fused", {"fusion": fusion, "first_stage": candidates.first_stage})
    found = {}
    for result in results:
        if not result.setting.cascade:
            run = fuse_runs(candidates, store.run(result.setting), [(first_stage, fusion)])
            found[result.setting] = replace(result, per_query=per_query(candidates, run, recall_at))
            fused_store.save(found[result.setting], run)
    cascades = [result.setting for result in results if result.setting.cascade]
    measured = measure_settings(reranker, candidates, cascades, fused_store, timed_pairs, recall_at, tokenized, fusion)
    found |= dict(zip(cascades, measured, strict=True))
    return [found[result.setting] for result in results]


@dataclass(frozen=True)
class TokenizedLists:
    """Tokenised pairs of all candidates.

    Attributes:
        inputs: id of each query with candidates to its pairs, in order.
        seconds_per_pair: time of tokenisation.
    """

    inputs: dict[str, list[TokenizedPair]]
    seconds_per_pair: float

    def pairs(self, queries: Sequence[str]) -> list[TokenizedPair]:
        """Return the pairs of some queries, list after list."""
        return [pair for query in queries for pair in self.inputs.get(query, [])]


def tokenize(reranker: MatryoshkaReranker, candidates: Candidates) -> TokenizedLists:
    """Tokenise all lists. Within a call of the tokenizer, a passage that is in several lists is tokenised once.

    A query with an instruction of its own has a call of its own.

    Raises:
        ValueError: if the template has no place for an instruction.
    """
    inputs: dict[str, list[TokenizedPair]] = {}
    start = time.perf_counter()
    own = candidates.collection.instructions
    for query in filter(own.__contains__, candidates.passages):
        inputs[query] = reranker.tokenize(candidates.pairs([query]), instruction=own[query])
    for queries in candidates.batches([query for query in candidates.passages if query not in own], PAIRS_AT_ONCE):
        rest = iter(reranker.tokenize(candidates.pairs(queries)))
        for query in queries:
            inputs[query] = list(islice(rest, len(candidates.passages[query])))
    return TokenizedLists(inputs, (time.perf_counter() - start) / len(candidates))


def score_exits(
    reranker: MatryoshkaReranker, candidates: Candidates, lists: TokenizedLists, settings: Sequence[Setting]
) -> list[Run]:
    """Score all candidates at several exits of the same width, in one pass.

    Args:
        reranker: the re-ranker.
        candidates: the candidates.
        lists: their tokenised pairs.
        settings: settings that differ in their exit only.

    Returns:
        A run for each setting.

    Raises:
        ValueError: if a score is not finite.
    """
    options = settings[0].arguments | {"cutoff_layers": [setting.depth for setting in settings]}
    runs: list[Run] = [{} for _ in settings]
    with tqdm(total=len(candidates), desc=str(settings[-1]), unit="pair", disable=None) as progress:
        for queries in candidates.batches(list(candidates.passages), PAIRS_AT_ONCE):
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


def run_cascade(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    lists: TokenizedLists,
    setting: Setting,
    fusion: float | None = None,
) -> tuple[Run, int]:
    """Return the run of a cascade and its floating-point operations: each candidate's, up to its last exit."""
    rankings: dict[str, list[str]] = {}
    flops = 0
    options = setting.arguments | {"cutoff_layers": [*dict(setting.cascade), setting.depth]}
    with tqdm(total=len(candidates), desc=str(setting), unit="pair", disable=None) as progress:
        for queries in candidates.batches(list(candidates.passages), reranker.batch_size):
            depths: list[int] = []
            for query, hits in zip(
                queries, score_cascade(reranker, candidates, lists, setting, queries, fusion), strict=True
            ):
                rankings[query] = [candidates.passages[query][index] for index in best_first(hits)]
                depths += [hit["cutoff_layer"] for hit in hits]
            pairs = lists.pairs(queries)
            flops += reranker.estimate_flops(pairs, depths, **options)
            progress.update(len(pairs))
    return in_order(rankings), flops


def score_cascade(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    lists: TokenizedLists,
    setting: Setting,
    queries: Sequence[str],
    fusion: float | None = None,
) -> list[list[Hit]]:
    """Score the lists of `queries` by `MatryoshkaReranker.score_lists`.

    Args:
        reranker: the re-ranker.
        candidates: the candidates.
        lists: their tokenised pairs.
        setting: a setting with a cascade.
        queries: ids of queries with candidates.
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
    """Draw the smallest random sample of queries whose lists have at least `pairs` pairs together."""
    queries = [query for query, passages in candidates.passages.items() if passages]
    return next(candidates.batches(random.Random(0).sample(queries, len(queries)), pairs))


def speed_and_memory(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    lists: TokenizedLists,
    setting: Setting,
    sample: list[str],
    fusion: float | None = None,
) -> tuple[float, int | None]:
    """Return pairs per second and peak memory in bytes of the sample's lists.

    The first list is scored before the measurement, as a warm-up. The time of tokenisation is that of `lists`.
    """

    def work(queries: list[str]) -> None:
        if setting.cascade:
            for batch in candidates.batches(queries, reranker.batch_size):
                score_cascade(reranker, candidates, lists, setting, batch, fusion)
        else:
            reranker.compute_score(lists.pairs(queries), show_progress_bar=False, **setting.arguments)

    work(sample[:1])
    start = time.perf_counter()
    memory = peak_memory(lambda: work(sample), reranker.target_devices)
    pairs = len(lists.pairs(sample))
    return pairs / (time.perf_counter() - start + pairs * lists.seconds_per_pair), memory


def peak_memory(work: Callable[[], object], devices: Sequence[str]) -> int | None:
    """Run `work` and return its peak memory in bytes.

    On a CUDA device it is the memory that torch allocated. On a CPU it is the resident memory of the process: Python,
    the weights, and what `work` allocates. Freed memory is returned to the system before.

    Returns:
        None on other devices, on systems other than Linux, and for several devices, which have worker processes.
    """
    if len(devices) > 1:
        work()
        return None
    device = torch.device(devices[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    return_freed_memory()
    resettable = device.type == "cpu" and _reset_high_water_mark()
    work()
    return _high_water_mark() if resettable else None


def _reset_high_water_mark() -> bool:
    """Reset the process's peak of resident memory, see proc_pid_clear_refs(5). Return False if that is impossible."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
