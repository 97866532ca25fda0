"""Measure quality and cost of a re-ranker's depths, widths and cascades on a collection in BEIR layout.

python -m flagembedding_matryoshka.evaluation --model DIR --data DIR --cutoff_layers 8 16 24 \
    --compress_layers 8 --compress_ratios 1 2 4 --cascade 8:0.5 16:0.2 --output DIR --write_plan
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.checkpoints.weights import weights_fingerprint
from flagembedding_matryoshka.evaluation.arguments import (
    BM25,
    CHECKPOINT,
    RERANKER,
    as_cascades,
    build_parser,
    collection_name,
)
from flagembedding_matryoshka.evaluation.baselines import as_given, at_random, by_bi_encoder
from flagembedding_matryoshka.evaluation.calibration import calibrate, check_calibration
from flagembedding_matryoshka.evaluation.candidates import Candidates, Halves, from_bm25, from_run, sample_queries
from flagembedding_matryoshka.evaluation.comparison import plan_settings
from flagembedding_matryoshka.evaluation.fusion import WEIGHTS, measure_fusion
from flagembedding_matryoshka.evaluation.measure import full_network, grid, measure_settings, sort_by_width, tokenize
from flagembedding_matryoshka.evaluation.report.files import write_report
from flagembedding_matryoshka.evaluation.report.report import Report
from flagembedding_matryoshka.evaluation.results import Store, conditions, machine_of
from flagembedding_matryoshka.evaluation.runs import first_stage_run
from flagembedding_matryoshka.inference.arguments import given_options
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Plan, adapter_names, load_plan
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.mining.pickles import BI_ENCODERS, refuse_pickled_modules
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.collections import read_collection


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: the arguments; None is `sys.argv`.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.write_plan and not Path(options.model).is_dir():
        parser.error(f"--write_plan writes into the model's directory, but {options.model} is not a local directory")
    runs = options.run or [BM25]
    names = [Path(run).stem for run in runs]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        parser.error(f"--run names files by their name without its suffix, and {repeated[0]} is given twice")
    cascades = as_cascades(parser, options.cascade)
    given = given_options(options, RERANKER)
    adapters = given.get("peft_path", [])
    checkpoint = inspect_checkpoint(options.model, **given_options(options, CHECKPOINT))
    config = checkpoint.config
    weights = partial(weights_fingerprint, checkpoint, adapters)
    settings = grid(
        config,
        options.cutoff_layers,
        options.compress_layers,
        options.compress_ratios,
        cascades,
        options.store_layers,
    )
    chosen: dict[float, Setting] = {}
    if options.budgets:
        plan = load_plan(options.model, config, adapters, weights)
        chosen = {budget: plan.choose(budget) for budget in options.budgets}
        settings = sort_by_width([*settings, *chosen.values()])
    collection = sample_queries(read_collection(options.data, options.split), options.queries, options.query_seed)
    first_stages = [
        from_bm25(collection, options.top_k) if run == BM25 else from_run(collection, Path(run), options.top_k)
        for run in runs
    ]
    halves = Halves.of(collection.relevant)
    allow_pickle = given.get("allow_pickle", False)
    _check_before_loading(options, allow_pickle, first_stages, halves)
    reranker = MatryoshkaReranker(options.model, **given)
    full = full_network(config)
    reports = {
        name: _measure(
            options, allow_pickle, reranker, candidates, settings, full, options.output / (name if runs[1:] else "")
        )
        for name, candidates in zip(names, first_stages, strict=True)
    }
    name = collection_name(options.data, options.split)
    write_report(options.output, name, reports, chosen, machine_of(reranker))
    for report in reports.values():
        if report.fusion is not None:
            print(f"{report.candidates.source}: {report.fusion.summary()}")
    if options.write_plan:
        path, first = Path(options.model) / PLAN_NAME, next(iter(reports.values()))
        calibrations = {item.setting: item.calibration for item in first.calibrations}
        plan = Plan(
            exit_layers=tuple(config.exit_layers),
            adapters=adapter_names(adapters),
            data=name,
            queries=len(halves.choosing),
            candidates=first.candidates.source,
            settings=plan_settings([item.result for item in first.settings], full, halves, calibrations),
            held_out_queries=len(halves.held_out),
            scored_with=reranker.scored_with(ScoringOptions.resolve(reranker, {})),
            weights=weights(),
            fusion=None if first.fusion is None else first.fusion.weight,
        )
        plan.write(path)
        print(f"Wrote {path}: {plan.queries} queries choose, {plan.held_out_queries} others were held out.")


def _check_before_loading(
    options: argparse.Namespace, allow_pickle: bool, first_stages: Sequence[Candidates], halves: Halves
) -> None:
    """Make checks that would otherwise fail after minutes of scoring.

    Raises:
        ImportError: as `check_calibration`.
        ValueError: as `Halves.check`, `check_calibration`, `first_stage_run` and `refuse_pickled_modules`.
    """
    for _, path in options.bi_encoder:
        if not allow_pickle:
            refuse_pickled_modules(path, BI_ENCODERS)
    if options.write_plan or options.calibrate or options.fusion is not None:
        halves.check()
    for candidates in first_stages:
        if options.calibrate:
            check_calibration(candidates, halves)
        if options.fusion is not None:
            first_stage_run(candidates)


def _measure(
    options: argparse.Namespace,
    allow_pickle: bool,
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    settings: Sequence[Setting],
    full: Setting,
    directory: Path,
) -> Report:
    """Measure settings, baselines, calibrations and fusion on the candidates of a first stage.

    Args:
        options: the command line.
        allow_pickle: whether bi-encoders may be read from pickles.
        reranker: the re-ranker.
        candidates: the candidates.
        settings: the settings, those of a width as neighbours.
        full: the deepest exit at full width.
        directory: directory of the results.
    """
    store = Store(directory, conditions(reranker, candidates, options.timed_pairs, options.recall_at))
    measures = (options.timed_pairs, options.recall_at, cache(partial(tokenize, reranker, candidates)))
    results = measure_settings(reranker, candidates, settings, store, *measures)
    baselines = [as_given(candidates, options.recall_at)]
    if options.random_order:
        baselines.append(at_random(candidates, options.recall_at))
    device, dtype = reranker.target_devices[0], reranker.model.dtype
    encoder_options = (options.timed_pairs, options.recall_at, device, dtype, allow_pickle)
    baselines += [by_bi_encoder(candidates, label, path, *encoder_options) for label, path in options.bi_encoder]
    calibrations = []
    if options.calibrate:
        scores = {setting: store.run(setting) for setting in settings if not setting.cascade}
        calibrations = calibrate(scores, candidates, Halves.of(candidates.passages))
    fusion = None
    if options.fusion is not None:
        weights = options.fusion or WEIGHTS
        fusion = measure_fusion(reranker, candidates, results, baselines, full, store, weights, *measures)
    return Report.of(candidates, results, baselines, full, calibrations, fusion)


if __name__ == "__main__":
    main()
