"""Measure quality and cost of a re-ranker's depths, widths and cascades on a collection in BEIR layout.

python -m flagembedding_matryoshka.evaluation --model DIR --data DIR --cutoff_layers 8 16 24 \
    --compress_layers 8 --compress_ratios 1 2 4 --cascade 8:0.5 16:0.2 --output DIR --write_plan
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from flagembedding_matryoshka.evaluation.arguments import (
    add_candidates,
    add_cascades,
    add_dtype,
    add_scoring,
    as_cascades,
    collection_name,
    positive,
)
from flagembedding_matryoshka.evaluation.baselines import as_given, at_random, by_bi_encoder
from flagembedding_matryoshka.evaluation.candidates import Candidates, from_bm25, from_run, sample_queries
from flagembedding_matryoshka.evaluation.measuring import evaluate
from flagembedding_matryoshka.evaluation.plot import plot
from flagembedding_matryoshka.evaluation.report import Compared, ComparedBaseline, compare, measured, table
from flagembedding_matryoshka.evaluation.settings import by_width, full_network, grid
from flagembedding_matryoshka.evaluation.store import Store, about, conditions
from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Plan, adapter_names, load_plan
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.models.loading import inspect_checkpoint
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.collections import read_collection


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flagembedding_matryoshka.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("what is ranked")
    data.add_argument("--data", type=Path, required=True, help="corpus.jsonl, queries.jsonl and qrels/ lie here")
    data.add_argument("--run", type=Path, help="re-rank the candidates of this TREC run instead of BM25's")
    add_candidates(data)

    model = parser.add_argument_group("the re-ranker", "as in MatryoshkaReranker")
    model.add_argument("--model", required=True, help="its name, such as smollm2, or path")
    model.add_argument("--peft_path", nargs="+", default=[], help="adapters to merge or attach, in order")
    model.add_argument("--start_layer", type=int, help="of a raw checkpoint (default: 4)")
    model.add_argument("--layer_sep", type=int, help="of a raw checkpoint (default: 1)")
    model.add_argument("--template", help="what stands around query and passage, by name or as a JSON file")
    add_dtype(model)
    add_scoring(model)

    settings = parser.add_argument_group("settings", "the full network is always measured beside them")
    settings.add_argument("--cutoff_layers", type=int, nargs="+", help="default: every exit")
    settings.add_argument("--compress_layers", type=int, nargs="+", default=[], help="for all ratios above 1")
    settings.add_argument("--compress_ratios", type=int, nargs="+", default=[1], help="default: 1, off")
    add_cascades(settings)
    settings.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[],
        help="also what the model's plan chooses within these shares of the full network's operations",
    )

    baselines = parser.add_argument_group("baselines", "the candidates' own order is always measured beside them")
    baselines.add_argument("--random_order", action="store_true", help="a random order of the candidates")
    baselines.add_argument(
        "--bi_encoder",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "PATH"),
        help="the order by cosine of a sentence-transformers model, in the same dtype; give it again for another",
    )

    output = parser.add_argument_group("measuring")
    output.add_argument("--output", type=Path, default=Path("evaluation_output"), help="default: %(default)s")
    output.add_argument("--recall_at", type=positive, default=10, help="default: %(default)s")
    output.add_argument("--timed_pairs", type=positive, default=1000, help="for the speed (default: %(default)s)")
    output.add_argument(
        "--write_plan", action="store_true", help=f"write {PLAN_NAME} beside the model, for its budget= and quality="
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.write_plan and not Path(options.model).is_dir():
        parser.error(f"--write_plan writes beside the model, but {options.model} is no local directory")
    cascades = as_cascades(parser, options.cascade)
    exits = {"start_layer": options.start_layer, "layer_sep": options.layer_sep}
    config = inspect_checkpoint(options.model, **exits).config
    settings = grid(config, options.cutoff_layers, options.compress_layers, options.compress_ratios, cascades)
    chosen: dict[float, Setting] = {}
    if options.budgets:
        plan = load_plan(options.model, config, options.peft_path)
        chosen = {budget: plan.choose(budget) for budget in options.budgets}
        settings = by_width([*settings, *chosen.values()])
    collection = sample_queries(read_collection(options.data, options.split), options.queries, options.query_seed)
    if options.run is None:
        candidates = from_bm25(collection, options.top_k)
    else:
        candidates = from_run(collection, options.run, options.top_k)
    reranker = MatryoshkaReranker(
        options.model,
        peft_path=options.peft_path,
        dtype=options.dtype,
        template=options.template,
        **exits,
        batch_size=options.batch_size,
        query_max_length=options.query_max_length,
        max_length=options.max_length,
        devices=options.devices,
    )
    store = Store(options.output, conditions(reranker, candidates, options.timed_pairs, options.recall_at))
    results = evaluate(reranker, candidates, settings, store, options.timed_pairs, options.recall_at)
    full = full_network(config)
    baselines = [as_given(candidates, options.recall_at)]
    if options.random_order:
        baselines.append(at_random(candidates, options.recall_at))
    device, dtype = reranker.target_devices[0], reranker.model.dtype
    for label, path in options.bi_encoder:
        baselines.append(by_bi_encoder(candidates, label, path, options.timed_pairs, options.recall_at, device, dtype))
    compared, beside = compare(results, full, baselines)
    name = collection_name(options.data, options.split)
    _write_report(options.output, compared, beside, chosen, candidates, name, about(reranker))
    if options.write_plan:
        plan = Plan(
            exit_layers=tuple(config.exit_layers),
            adapters=adapter_names(options.peft_path),
            data=name,
            queries=len(candidates.passages),
            candidates=candidates.source,
            settings=measured(compared, full),
        )
        plan.write(Path(options.model) / PLAN_NAME)
        print(f"Wrote {Path(options.model) / PLAN_NAME}.")


def _write_report(
    output: Path,
    compared: Sequence[Compared],
    baselines: Sequence[ComparedBaseline],
    chosen: Mapping[float, Setting],
    candidates: Candidates,
    name: str,
    about_machine: dict,
) -> None:
    text = table(compared, baselines, chosen)
    about = f"{name}: {len(candidates.passages)} queries, {len(candidates)} pairs, {candidates.source}"
    print(f"{about}\n\n{text}")
    report = {
        "data": name,
        "queries": len(candidates.passages),
        "pairs": len(candidates),
        "candidates": candidates.source,
        "machine": about_machine,
        "baselines": [item.as_json() for item in baselines],
        "settings": [item.as_json() for item in compared],
        "chosen": [{"budget": budget, **asdict(setting)} for budget, setting in chosen.items()],
    }
    write_text(output / "table.md", text)
    write_text(output / "results.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    plot(compared, [item.baseline for item in baselines], about, output / "quality_cost.png")
    print(f"Wrote table.md, results.json, quality_cost.png and a TREC run per setting to {output}.")


if __name__ == "__main__":
    main()
