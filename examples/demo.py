"""Fine-tune the tiny base by self-distillation on docstrings, then re-rank BM25's lists at several depths and widths.

    python examples/demo.py

Everything it needs is on the machine: the text is the docstrings of Python's standard library and of the packages that
this requires, the base model is shipped. It writes a table, its numbers and a plot to the output folder.
"""

import argparse
import json
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import ir_measures
import matplotlib
import torch
from docstrings import Candidates, candidates, collect_pairs, split, training_rows, write_jsonl
from ir_measures import RR, nDCG

from flagembedding_matryoshka import TINY_BASE, MatryoshkaReranker

QUERIES, CANDIDATES, TIMED_PAIRS = 150, 20, 200
START_LAYER, COMPRESS_LAYER, RATIOS = 3, 3, [1, 2, 4]
TRAINING = {
    "learning_rate": 2e-4,
    "max_steps": 40,
    "warmup_ratio": 0.1,
    "per_device_train_batch_size": 8,
    "train_group_size": 8,
    "query_max_len": 32,
    "passage_max_len": 108,
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "start_layer": START_LAYER,
    "layer_sep": 1,
    "train_method": "distill_fix_layer_teacher",
    "logging_steps": 10,
    "save_strategy": "no",
    "ddp_find_unused_parameters": False,
    "report_to": "none",
    "seed": 1,
}
SCORING = {"query_max_length": 32, "max_length": 140}


@dataclass(frozen=True)
class Result:
    """Quality and cost of one order of the candidates; orders that are not ours cost nothing here."""

    order: str
    mrr: float
    ndcg: float
    pairs_per_second: float | None = None
    mflops_per_pair: float | None = None
    depth: int | None = None
    ratio: int | None = None


def fine_tune(train_data: Path, output_dir: Path) -> None:
    """The command line that a user types, in a process of its own."""
    options = [text for name, value in TRAINING.items() for text in (f"--{name}", str(value))]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"),
        *("-m", "flagembedding_matryoshka.finetune", "--use_cpu", "True"),
        *("--model_name_or_path", TINY_BASE, "--train_data", str(train_data), "--output_dir", str(output_dir)),
        *("--cache_path", str(output_dir.parent)),
        *("--knowledge_distillation", "True", "--compress_layers", str(COMPRESS_LAYER)),
        *("--compress_ratios", *map(str, RATIOS), *options),
    ]
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def quality(lists: list[Candidates], scores: list[list[float]]) -> tuple[float, float]:
    """MRR@10 and nDCG@10 of ordering each list by its scores."""
    qrels = [ir_measures.Qrel(str(i), str(item.positive), 1) for i, item in enumerate(lists)]
    run = [ir_measures.ScoredDoc(str(i), str(j), score) for i, row in enumerate(scores) for j, score in enumerate(row)]
    measured = ir_measures.calc_aggregate([RR @ 10, nDCG @ 10], qrels, run)
    return measured[RR @ 10], measured[nDCG @ 10]


def in_lists(scores: list[float]) -> list[list[float]]:
    """Scores of all pairs, cut into the lists that they came from."""
    return [scores[start : start + CANDIDATES] for start in range(0, len(scores), CANDIDATES)]


def evaluate(name: str, model_path: str, lists: list[Candidates], ratios: list[int]) -> list[Result]:
    """Every exit at every ratio: quality from one pass per ratio, speed from a pass per setting."""
    reranker = MatryoshkaReranker(model_path, start_layer=START_LAYER, devices="cpu", batch_size=32, **SCORING)
    pairs = [(item.query, passage) for item in lists for passage in item.passages]
    timed = random.Random(0).sample(pairs, min(TIMED_PAIRS, len(pairs)))
    reranker.compute_score(timed[:32])
    exits, results = reranker.config.exit_layers, []
    for ratio in ratios:
        width = {"compress_layers": [COMPRESS_LAYER], "compress_ratio": ratio}
        by_exit = reranker.compute_score(pairs, cutoff_layers=exits, show_progress_bar=False, **width)
        for depth, scores in zip(exits, by_exit, strict=True):
            if ratio > 1 and depth <= COMPRESS_LAYER:
                continue
            setting = {"cutoff_layers": [depth], "show_progress_bar": False, **width}
            start = time.perf_counter()
            reranker.compute_score(timed, **setting)
            speed = len(timed) / (time.perf_counter() - start)
            flops = reranker.estimate_flops(timed, cutoff_layers=[depth], **width) / len(timed)
            order = f"{name}, {depth} layers, ratio {ratio}"
            results.append(Result(order, *quality(lists, in_lists(scores)), speed, flops / 1e6, depth, ratio))
    return results


def other_orders(lists: list[Candidates]) -> list[Result]:
    """BM25's own order, and a random one."""
    draw = random.Random(0).random
    bm25 = [[-float(rank) for rank in range(len(item.passages))] for item in lists]
    chance = [[draw() for _ in item.passages] for item in lists]
    return [Result("random order", *quality(lists, chance)), Result("BM25's order", *quality(lists, bm25))]


def print_table(results: list[Result]) -> None:
    print(f"\n{'order':36} {'MRR@10':>7} {'nDCG@10':>8} {'pairs/s':>8} {'MFLOP/pair':>11}")
    for result in results:
        cost = f"{result.pairs_per_second:8.0f} {result.mflops_per_pair:11.0f}" if result.mflops_per_pair else ""
        print(f"{result.order:36} {result.mrr:7.3f} {result.ndcg:8.3f} {cost}")


def plot(results: list[Result], path: Path) -> None:
    """Quality against cost: a line per width, a point per depth, the orders that cost nothing as levels."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for marker, ratio in zip("osD", RATIOS, strict=True):
        line = [result for result in results if result.order.startswith("fine-tuned") and result.ratio == ratio]
        label = "full width" if ratio == 1 else f"ratio {ratio} after layer {COMPRESS_LAYER}"
        axes.plot([r.mflops_per_pair for r in line], [r.mrr for r in line], marker=marker, label=label)
        for result in line:
            text, place = f"{result.depth}", (result.mflops_per_pair, result.mrr)
            axes.annotate(text, place, xytext=(0, -12), textcoords="offset points", ha="center", fontsize=8)
    base = [result for result in results if result.order.startswith("base") and result.ratio == 1]
    axes.plot([r.mflops_per_pair for r in base], [r.mrr for r in base], ":", color="grey", label="before fine-tuning")
    for result in results[:2]:
        axes.axhline(result.mrr, color="black", lw=0.8, ls="--" if "BM25" in result.order else ":")
        axes.annotate(result.order, (1, result.mrr), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel="MFLOP per pair", ylabel="MRR@10", title="One model, read at 3 to 6 layers (numbers on the points)")
    axes.set_ylim(0, 1.2 * max(result.mrr for result in results))
    axes.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def processor() -> str:
    """What torch knows of the processor's name."""
    return str(torch.cpu.get_capabilities().get("cpu_name", platform.processor()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="default: %(default)s")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    pairs = collect_pairs()
    parts = split(pairs)
    found = candidates(parts.held_out, [pair.passage for pair in pairs], CANDIDATES)
    lists = found[:QUERIES]
    print(
        f"{len(pairs)} summary lines and docstrings, {len(parts.train)} of them to train on. For {len(found)} of "
        f"{len(parts.held_out)} held-out summary lines BM25 has the docstring among its first {CANDIDATES}; the first "
        f"{len(lists)} of these are re-ranked.",
        flush=True,
    )

    wanted = TRAINING["max_steps"] * TRAINING["per_device_train_batch_size"]
    queries = random.Random(0).sample(parts.train, 2 * wanted)
    with tempfile.TemporaryDirectory() as folder:
        train_data, model = Path(folder) / "train.jsonl", Path(folder) / "model"
        write_jsonl(train_data, islice(training_rows(queries, parts.train), wanted))
        fine_tune(train_data, model)
        results = [
            *other_orders(lists),
            *evaluate("base", TINY_BASE, lists, [1]),
            *evaluate("fine-tuned", str(model), lists, RATIOS),
        ]
    print_table(results)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor()}
    report = {"machine": machine, "results": [asdict(result) for result in results]}
    (output_dir / "results.json").write_text(json.dumps(report, indent=1))
    plot(results, output_dir / "quality_cost.png")
    print(f"\nWrote {output_dir / 'results.json'} and {output_dir / 'quality_cost.png'}.")
    print(f"All in {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
