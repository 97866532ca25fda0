"""What is measured of one shape."""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch

from benchmarks.measuring import matrix_flops_per_second
from benchmarks.scoring.checkpoints import config_of, write_checkpoint
from benchmarks.scoring.settings import CANDIDATES, Workload, quantizations, settings_of
from benchmarks.scoring.texts import random_lists, random_pairs, words_of
from benchmarks.scoring.timing import take_turns
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.loading import load_tokenizer

MAX_LENGTH = 512
FIRST_PAIR = ("a query", "a passage")


def load(shape: str, args: argparse.Namespace) -> tuple[MatryoshkaReranker, dict[str, MatryoshkaReranker], float]:
    """The re-ranker of a shape, by the name of the setting the same with fewer bits, invariant or not compiled, and the
    seconds from a checkpoint to the first score."""
    tokenizer = load_tokenizer(args.tokenizer)
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as path:
        write_checkpoint(config_of(shape, len(tokenizer)), tokenizer, path, dtype, args.device)
        options = {"dtype": args.dtype, "devices": args.device, "max_length": MAX_LENGTH, "batch_size": 1024}
        start = time.perf_counter()
        ours = MatryoshkaReranker(path, **options, compile=args.compile)
        ours.compute_score(FIRST_PAIR)
        seconds = time.perf_counter() - start
        others = {
            f"full depth, {method}": MatryoshkaReranker(path, **options, quantization=method)
            for method in quantizations(ours)
        }
        if dtype == torch.bfloat16 and args.device == "cpu":
            others["full depth, batch-invariant"] = MatryoshkaReranker(path, **options, batch_invariant=True)
        if args.compile:
            others["full depth, not compiled"] = MatryoshkaReranker(path, **options)
    return ours, others, seconds


def measure_shape(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """All settings of one shape, timed side by side."""
    ours, others, first = load(shape, args)
    draw = random.Random(0)
    words = words_of(ours.tokenizer)
    pairs = random_pairs(words, args.pairs, draw)
    lists = {} if args.pairs_only else random_lists(words, max(1, args.pairs // CANDIDATES), CANDIDATES, draw)
    lengths = sorted(map(len, ours.tokenize(pairs)))
    settings = settings_of(ours, pairs, lists)
    reference = torch.tensor(ours.compute_score(pairs, show_progress_bar=False))
    correlations = {}
    for place, (name, model) in enumerate(others.items(), start=2):
        score = partial(model.compute_score, pairs, show_progress_bar=False)
        correlations[name] = torch.corrcoef(torch.stack([torch.tensor(score()), reference]))[0, 1].item()
        settings.insert(place, Workload(name, score, len(pairs), None))
    seconds = take_turns(settings, args.rounds, args.device)
    (tokenizing,) = take_turns(
        [Workload("tokenizing", partial(ours.tokenize, pairs), len(pairs), None)], args.rounds, args.device
    ).values()
    peak = matrix_flops_per_second(args.device, ours.model.dtype)

    full = next(setting for setting in settings if setting.name == "full depth")
    results = []
    for setting in settings:
        result = throughput(setting, seconds)
        if setting.flops:
            result |= arithmetic(setting, full, seconds, peak)
        if setting.name in correlations:
            result["correlation_with_full_depth"] = correlations[setting.name]
        results.append(result)
    return {
        "shape": shape,
        "dtype": str(ours.model.dtype).removeprefix("torch."),
        "pairs": len(pairs),
        "tokens_per_pair": [lengths[0], statistics.median(lengths), lengths[-1]],
        "matrix_tflops_per_s": peak / 1e12,
        "seconds_to_first_score": first,
        "tokenizing_share": statistics.median(tokenizing) / statistics.median(seconds[full.name]),
        "settings": results,
    }


def throughput(setting: Workload, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Pairs per second, and how many times as many as what the setting is against."""
    own = seconds[setting.name]
    return {
        "setting": setting.name,
        "pairs_per_s": setting.pairs / statistics.median(own),
        "pairs_per_s_range": [setting.pairs / limit(own) for limit in (max, min)],
        "speedup": statistics.median(plain / ours for plain, ours in zip(seconds[setting.against], own, strict=True)),
    }


def arithmetic(setting: Workload, full: Workload, seconds: dict[str, list[float]], peak: float) -> dict[str, float]:
    """How fast a setting computes, and its arithmetic and time as shares of full depth's."""
    median = statistics.median(seconds[setting.name])
    return {
        "tflops_per_s": setting.flops / median / 1e12,
        "share_of_matrix_peak": setting.flops / median / peak,
        "flops_share": setting.flops / full.flops,
        "time_share": median / statistics.median(seconds[full.name]),
    }
