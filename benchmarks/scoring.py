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
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ir_measures
import torch
from ir_measures import nDCG
from torch import nn
from tqdm import tqdm
from transformers import MistralModel, PreTrainedTokenizerBase

from benchmarks.measuring import environment, matrix_flops_per_second, synchronize
from flagembedding_matryoshka import SMOLLM2, CostWiseMistralConfig, CostWiseMistralForCausalLM, MatryoshkaReranker
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.inference.quantization import Quantization
from flagembedding_matryoshka.models.loading import load_tokenizer
from flagembedding_matryoshka.models.shipped import SMOLLM2_BASE_NAME
from flagembedding_matryoshka.text.pairs import PairTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from docstrings import candidates, collect_pairs, split

SHAPES = {"4x128": (4, 128), "16x512": (16, 512), "24x1024": (24, 1024)}
QUERY_WORDS, PASSAGE_WORDS = (5, 15), (5, 150)
MAX_LENGTH, BASELINE_BATCH = 512, 32
CANDIDATES, TOP = 100, 10
WORD_START = "Ġ"
TOLERANCE = 1e-4
PLAIN, PLAIN_SHARED = "plain cross-encoder", "plain, shared query"


def config_of(layers: int, hidden: int) -> CostWiseMistralConfig:
    """Mistral's proportions, an exit at every quarter of the depth, the vocabulary of the shipped re-ranker's base."""
    return CostWiseMistralConfig(
        layer_wise=True,
        start_layer=layers // 4,
        layer_sep=layers // 4,
        vocab_size=len(load_tokenizer(SMOLLM2_BASE_NAME)),
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=2048,
        sliding_window=None,
    )


def write_checkpoint(config: CostWiseMistralConfig, path: str) -> None:
    """Random weights that tell passages apart; the last head is the one that the plain cross-encoder has."""
    torch.manual_seed(0)
    model = CostWiseMistralForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.normal_(std=weight.shape[1] ** -0.5)
    model.save_pretrained(path)
    load_tokenizer(SMOLLM2_BASE_NAME).save_pretrained(path)


def random_texts(words: Sequence[str], count: int, lengths: tuple[int, int], draw: random.Random) -> list[str]:
    return [" ".join(draw.choices(words, k=draw.randint(*lengths))) for _ in range(count)]


class PlainCrossEncoder(nn.Module):
    """transformers' Mistral under one linear output, on padded batches."""

    def __init__(self, ours: MatryoshkaReranker) -> None:
        super().__init__()
        config = CostWiseMistralConfig(**ours.config.to_dict() | {"layer_wise": False})
        config._attn_implementation = "sdpa"
        self.mistral = MistralModel(config).to(ours.model.device, ours.model.dtype).eval()
        self.mistral.load_state_dict(ours.model.model.state_dict())
        self.head = ours.model.lm_head[-1].linear_head
        self.ours = ours

    @torch.inference_mode()
    def compute_score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Scores in the order given. The texts become tokens as ours do."""
        inputs = ScoringOptions.resolve(self.ours, {}).tokenize(pairs, PairTokenizer(self.ours.tokenizer))
        order = sorted(range(len(pairs)), key=lambda index: -len(inputs[index].input_ids))
        scores = torch.empty(len(pairs))
        tokenizer: PreTrainedTokenizerBase = self.ours.tokenizer
        for start in range(0, len(order), BASELINE_BATCH):
            places = order[start : start + BASELINE_BATCH]
            rows = {"input_ids": [inputs[index].input_ids for index in places]}
            batch = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(self.mistral.device)
            hidden = self.mistral(**batch, use_cache=False).last_hidden_state
            last = batch["attention_mask"].sum(1) - 1
            scores[places] = self.head(hidden[torch.arange(len(places)), last])[:, 0].float().cpu()
        return scores.tolist()


@dataclass(frozen=True)
class Timed:
    """What is timed, its arithmetic per call (None: not counted), and the setting that its speedup is against."""

    name: str
    score: Callable[[], Any]
    pairs: int
    flops: int | None
    against: str = PLAIN


def settings_of(ours: MatryoshkaReranker, pairs: list[tuple[str, str]], lists: dict[str, list[str]]) -> list[Timed]:
    """The plain cross-encoder, then ours: depth and width, a query that candidates share, dropping candidates."""
    layers = ours.config.num_hidden_layers
    quarter, half = layers // 4, layers // 2
    plain = PlainCrossEncoder(ours)
    apart = torch.tensor(plain.compute_score(pairs)) - torch.tensor(ours.compute_score(pairs))
    if ours.model.dtype == torch.float32 and not apart.abs().max() <= TOLERANCE:
        raise RuntimeError(f"ours and the plain cross-encoder differ by up to {apart.abs().max():.2g} in their scores")

    def width(ratio: int, *compress_layers: int) -> dict[str, Any]:
        return {"compress_layers": compress_layers, "compress_ratio": ratio}

    def scoring(name: str, **options: Any) -> Timed:
        flops = ours.estimate_flops(pairs, **options)
        return Timed(name, lambda: ours.compute_score(pairs, show_progress_bar=False, **options), len(pairs), flops)

    queries, documents = list(lists), list(lists.values())
    shared = [(query, text) for query, texts in lists.items() for text in texts]
    cascade = {quarter: 0.3, half: TOP / CANDIDATES}
    settings = [
        Timed(PLAIN, lambda: plain.compute_score(pairs), len(pairs), None),
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
        Timed(PLAIN_SHARED, lambda: plain.compute_score(shared), len(shared), None, PLAIN_SHARED),
        Timed(
            "shared query",
            lambda: ours.compute_score(shared, show_progress_bar=False),
            len(shared),
            ours.estimate_flops(shared),
            PLAIN_SHARED,
        ),
        Timed(
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


def take_turns(settings: Sequence[Timed], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call, by setting."""
    seconds: dict[str, list[float]] = {setting.name: [] for setting in settings}
    for number in tqdm(range(-1, rounds), desc="rounds", leave=False):
        for setting in settings if number % 2 else reversed(settings):
            synchronize(device)
            start = time.perf_counter()
            setting.score()
            synchronize(device)
            if number >= 0:
                seconds[setting.name].append(time.perf_counter() - start)
    return seconds


def measure_shape(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All settings of one shape, timed side by side."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as path:
        write_checkpoint(config_of(*SHAPES[name]), path)
        options = {"dtype": args.dtype, "devices": args.device, "max_length": MAX_LENGTH, "batch_size": 1024}
        ours = MatryoshkaReranker(path, **options)
        quantized = {
            f"full depth, {method}": MatryoshkaReranker(path, **options, quantization=method)
            for method in quantizations(ours)
        }
    tokens = ours.tokenizer.get_vocab()
    words = [token[1:] for token in tokens if token[0] == WORD_START and token[1:].isascii() and token[1:].isalpha()]
    pairs = list(
        zip(
            random_texts(words, args.pairs, QUERY_WORDS, draw),
            random_texts(words, args.pairs, PASSAGE_WORDS, draw),
            strict=True,
        )
    )
    queries = random_texts(words, max(1, args.pairs // CANDIDATES), QUERY_WORDS, draw)
    lists = {query: random_texts(words, CANDIDATES, PASSAGE_WORDS, draw) for query in queries}
    if args.pairs_only:
        lists = {}
    inputs = ScoringOptions.resolve(ours, {}).tokenize(pairs, PairTokenizer(ours.tokenizer))
    lengths = sorted(len(pair.input_ids) for pair in inputs)
    settings = settings_of(ours, pairs, lists)
    reference = torch.tensor(ours.compute_score(pairs, show_progress_bar=False))
    correlations = {}
    for place, (setting_name, model) in enumerate(quantized.items(), start=2):
        score = partial(model.compute_score, pairs, show_progress_bar=False)
        correlations[setting_name] = torch.corrcoef(torch.stack([torch.tensor(score()), reference]))[0, 1].item()
        settings.insert(place, Timed(setting_name, score, len(pairs), None))
    seconds = take_turns(settings, args.rounds, args.device)
    peak = matrix_flops_per_second(args.device, ours.model.dtype)

    full = next(setting for setting in settings if setting.name == "full depth")
    results = []
    for setting in settings:
        median = statistics.median(seconds[setting.name])
        result: dict[str, Any] = {
            "setting": setting.name,
            "pairs_per_s": setting.pairs / median,
            "pairs_per_s_range": [setting.pairs / limit(seconds[setting.name]) for limit in (max, min)],
            "speedup": statistics.median(
                plain / own for plain, own in zip(seconds[setting.against], seconds[setting.name], strict=True)
            ),
        }
        if setting.flops:
            result |= {
                "tflops_per_s": setting.flops / median / 1e12,
                "share_of_matrix_peak": setting.flops / median / peak,
                "flops_share": setting.flops / full.flops,
                "time_share": median / statistics.median(seconds[full.name]),
            }
        if setting.name in correlations:
            result["correlation_with_full_depth"] = correlations[setting.name]
        results.append(result)
    return {
        "shape": name,
        "dtype": str(ours.model.dtype).removeprefix("torch."),
        "pairs": len(pairs),
        "tokens_per_pair": [lengths[0], statistics.median(lengths), lengths[-1]],
        "matrix_tflops_per_s": peak / 1e12,
        "settings": results,
    }


def agreement(queries: int) -> list[dict[str, Any]]:
    """How much of the full ranking of real candidates survives, with the shipped re-ranker."""
    pairs = collect_pairs()
    lists = candidates(split(pairs).held_out, [pair.passage for pair in pairs], CANDIDATES)[:queries]
    options = {"query_max_length": 32, "max_length": 140, "devices": "cpu"}
    ours = MatryoshkaReranker(SMOLLM2, **options)
    first, second = ours.config.exit_layers[:2]
    settings: list[tuple[str, MatryoshkaReranker, dict[int, float] | None]] = [("full depth", ours, None)]
    for method in quantizations(ours):
        settings.append((method, MatryoshkaReranker(SMOLLM2, **options, quantization=method), None))
    cascades = ({first: 0.5}, {first: 0.3, second: 0.1}, {first: 0.1})
    settings += [(f"cascade {cascade}", ours, cascade) for cascade in cascades]

    qrels = [ir_measures.Qrel(str(number), str(item.positive), 1) for number, item in enumerate(lists)]
    results: list[dict[str, Any]] = []
    full: list[set[int]] = []
    for name, model, cascade in settings:
        rankings = model.rank_batch(
            [item.query for item in lists], [item.passages for item in lists], TOP, cascade=cascade
        )
        run = [
            ir_measures.ScoredDoc(str(number), str(document["corpus_id"]), -float(place))
            for number, ranking in enumerate(rankings)
            for place, document in enumerate(ranking)
        ]
        top = [{document["corpus_id"] for document in ranking} for ranking in rankings]
        full = full or top
        results.append(
            {
                "setting": name,
                "queries": len(lists),
                "nDCG@10": ir_measures.calc_aggregate([nDCG @ 10], qrels, run)[nDCG @ 10],
                "overlap_of_top_10": statistics.mean(len(a & b) / TOP for a, b in zip(top, full, strict=True)),
            }
        )
    return results


def print_table(report: dict[str, Any]) -> None:
    low, median, high = report["tokens_per_pair"]
    print(
        f"\n{report['shape']}, {report['dtype']}, {report['pairs']} pairs of {low} to {high} tokens (median {median}), "
        f"matrix product {report['matrix_tflops_per_s']:.3f} TFLOP/s"
    )
    print(f"{'setting':26}{'pairs/s':>9}{'(range)':>18}{'speedup':>9}{'of peak':>9}{'FLOPs':>8}{'time':>8}")
    for row in report["settings"]:
        low, high = row["pairs_per_s_range"]
        line = f"{row['setting']:26}{row['pairs_per_s']:9.1f}{f'({low:.1f}–{high:.1f})':>18}{row['speedup']:9.2f}"
        if "flops_share" in row:
            line += f"{row['share_of_matrix_peak']:9.2f}{row['flops_share']:8.2f}{row['time_share']:8.2f}"
        print(line, flush=True)


def plot(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """How many times as fast as a plain cross-encoder each setting is, for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row["setting"] for row in reports[0]["settings"] if not row["setting"].startswith("plain")]
    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    height = 0.8 / len(reports)
    for number, report in enumerate(reports):
        speedups = {row["setting"]: row["speedup"] for row in report["settings"]}
        places = [place + number * height for place in range(len(names))]
        bars = axes.barh(places, [speedups[name] for name in names], height, label=report["shape"])
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axes.axvline(1, color="black", lw=0.8, ls=":")
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as a plain cross-encoder of the same shape (padded, SDPA, full depth)")
    axes.legend(title="layers × hidden", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--pairs", type=int, default=100, help="scored per call; default: %(default)s")
    parser.add_argument("--pairs_only", action="store_true", help="leave out lists of candidates for one query")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=10, help="of the agreement; default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="file to write the JSON to as well")
    parser.add_argument("--figure", type=Path, help="file to draw the speedups into")
    args = parser.parse_args()

    report: dict[str, Any] = {"benchmark": "scoring", "environment": environment(args.device), "shapes": []}
    for name in args.shapes:
        report["shapes"].append(measure_shape(name, args))
        print_table(report["shapes"][-1])
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
