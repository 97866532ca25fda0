"""Measure quality and cost of a re-ranker's depths, widths and cascades on a collection in BEIR layout.

python -m flagembedding_matryoshka.evaluation --model DIR --data DIR --cutoff_layers 8 16 24 \
    --compress_layers 8 --compress_ratios 1 2 4 --cascade 8:0.5 16:0.2 --output DIR --write_plan
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.checkpoints.weights import weights_fingerprint
from flagembedding_matryoshka.evaluation.arguments import as_cascades, collection_name
from flagembedding_matryoshka.evaluation.baselines import as_given, at_random, by_bi_encoder
from flagembedding_matryoshka.evaluation.calibration import refuse_one_kind
from flagembedding_matryoshka.evaluation.candidates import Candidates, from_bm25, from_run, sample_queries
from flagembedding_matryoshka.evaluation.choice import measured
from flagembedding_matryoshka.evaluation.fusion import measure_fusion
from flagembedding_matryoshka.evaluation.halves import Halves
from flagembedding_matryoshka.evaluation.measuring import evaluate, tokenize
from flagembedding_matryoshka.evaluation.page import page
from flagembedding_matryoshka.evaluation.parser import BM25, build_parser
from flagembedding_matryoshka.evaluation.plot import plot
from flagembedding_matryoshka.evaluation.settings import by_width, full_network, grid
from flagembedding_matryoshka.evaluation.stage import Stage, side_by_side
from flagembedding_matryoshka.evaluation.store import Store, about, conditions
from flagembedding_matryoshka.evaluation.weighting import WEIGHTS, first_stage_run
from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Plan, adapter_names, load_plan
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.collections import read_collection


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.write_plan and not Path(options.model).is_dir():
        parser.error(f"--write_plan writes beside the model, but {options.model} is no local directory")
    runs = options.run or [BM25]
    names = [Path(run).stem for run in runs]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        parser.error(f"--run names files by what they are called, and {twice[0]} is there twice")
    cascades = as_cascades(parser, options.cascade)
    exits = {"start_layer": options.start_layer, "layer_sep": options.layer_sep}
    checkpoint = inspect_checkpoint(options.model, **exits, template=options.template)
    config = checkpoint.config
    weights = partial(weights_fingerprint, checkpoint, options.peft_path)
    settings = grid(config, options.cutoff_layers, options.compress_layers, options.compress_ratios, cascades)
    chosen: dict[float, Setting] = {}
    if options.budgets:
        plan = load_plan(options.model, config, options.peft_path, weights)
        chosen = {budget: plan.choose(budget) for budget in options.budgets}
        settings = by_width([*settings, *chosen.values()])
    collection = sample_queries(read_collection(options.data, options.split), options.queries, options.query_seed)
    first_stages = [
        from_bm25(collection, options.top_k) if run == BM25 else from_run(collection, Path(run), options.top_k)
        for run in runs
    ]
    halves = Halves.of(collection.relevant)
    if options.write_plan or options.calibrate or options.fusion is not None:
        halves.check()
    if options.calibrate:
        for candidates in first_stages:
            refuse_one_kind(candidates, halves)
    if options.fusion is not None:
        for candidates in first_stages:
            first_stage_run(candidates)  # raises, before the model is loaded, if there are no scores
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
    full = full_network(config)

    def measure(candidates: Candidates, directory: Path) -> Stage:
        store = Store(directory, conditions(reranker, candidates, options.timed_pairs, options.recall_at))
        tokenized = cache(partial(tokenize, reranker, candidates))
        measures = (options.timed_pairs, options.recall_at, tokenized)
        results = evaluate(reranker, candidates, settings, store, *measures)
        baselines = [as_given(candidates, options.recall_at)]
        if options.random_order:
            baselines.append(at_random(candidates, options.recall_at))
        ways = (options.timed_pairs, options.recall_at, reranker.target_devices[0], reranker.model.dtype)
        baselines += [by_bi_encoder(candidates, label, path, *ways) for label, path in options.bi_encoder]
        calibrated = []
        if options.calibrate:
            # What it imports takes seconds: only who asks for it waits.
            from flagembedding_matryoshka.evaluation.fitting import calibrate

            scores = {setting: store.run(setting) for setting in settings if not setting.cascade}
            calibrated = calibrate(scores, candidates, halves)
        fusion = None
        if options.fusion is not None:
            weights = options.fusion or WEIGHTS
            fusion = measure_fusion(reranker, candidates, results, baselines, full, store, weights, *measures)
        return Stage.of(candidates, results, baselines, full, calibrated, fusion)

    several = len(runs) > 1
    stages = [
        measure(candidates, options.output / name if several else options.output)
        for name, candidates in zip(names, first_stages, strict=True)
    ]
    name = collection_name(options.data, options.split)
    _write_report(options.output, stages, chosen, names, name, about(reranker))
    for stage in stages:
        if stage.fusion is not None:
            print(f"{stage.candidates.source}: {stage.fusion.summary()}")
    if options.write_plan:
        path, first = Path(options.model) / PLAN_NAME, stages[0]
        maps = {item.setting: item.calibration for item in first.calibrated}
        plan = Plan(
            exit_layers=tuple(config.exit_layers),
            adapters=adapter_names(options.peft_path),
            data=name,
            queries=len(halves.choosing),
            candidates=first.candidates.source,
            settings=measured([item.result for item in first.compared], full, halves, maps),
            held_out_queries=len(halves.held_out),
            scored_with=reranker.scored_with(ScoringOptions.resolve(reranker, {})),
            weights=weights(),
            fusion=None if first.fusion is None else first.fusion.weight,
        )
        plan.write(path)
        print(f"Wrote {path}: {plan.queries} queries choose, {plan.held_out_queries} others were held out.")


def _write_report(
    output: Path,
    stages: Sequence[Stage],
    chosen: Mapping[float, Setting],
    names: Sequence[str],
    name: str,
    about_machine: dict,
) -> None:
    parts = []
    beside = None
    if len(stages) > 1:
        beside = side_by_side(dict(zip(names, stages, strict=True)))
        parts.append(beside)
    for stage in stages:
        parts.append(f"{name}: {stage.about}\n")
        parts += [f"{part.said}:\n\n{part.table}" for part in stage.parts(chosen)]
    text = "\n".join(parts)
    print(text)
    report = {
        "data": name,
        "machine": about_machine,
        **stages[0].as_json(),
        "chosen": [{"budget": budget, **asdict(setting)} for budget, setting in chosen.items()],
        "other_first_stages": [stage.as_json() for stage in stages[1:]],
    }
    write_text(output / "table.md", text)
    write_text(output / "results.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(output / "report.html", page(name, stages, beside, chosen))
    pictures = ["quality_cost.png", *(f"quality_cost_{other}.png" for other in names[1:])]
    for stage, picture in zip(stages, pictures, strict=True):
        plot(stage, f"{name}: {stage.about}", output / picture)
    print(f"Wrote report.html, table.md, results.json, {', '.join(pictures)} and a TREC run per setting to {output}.")


if __name__ == "__main__":
    main()
