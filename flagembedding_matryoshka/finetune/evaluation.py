"""How well every exit ranks lists of which the relevant passages are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ir_measures
import numpy as np
from ir_measures import RR, nDCG
from transformers import EvalPrediction

PADDING = -100
"""Stands behind the end of a list in scores and labels, as `Trainer` pads them."""


BEST_METRIC = "nDCG@10"


def rank_checkpoints(args: Any) -> None:
    """Let `TrainingArguments` evaluate whenever a checkpoint is written, where nothing else is asked for, and keep the
    one that ranks best: transformers' default is a loss, of which lists that are ranked have none."""
    if args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = BEST_METRIC, True
    if args.eval_strategy == "no":
        args.eval_strategy, args.eval_steps = args.save_strategy, args.save_steps


def ranking_metrics(prediction: EvalPrediction, exits: Sequence[int]) -> dict[str, float]:
    """MRR@10 and nDCG@10 of each exit, `layer_{exit}_MRR@10`, and their means over the exits, `MRR@10`.

    Args:
        prediction: scores (queries, longest list, exits) and labels (queries, longest list), 1 on relevant passages.
    """
    scores, labels = np.asarray(prediction.predictions, dtype=float), np.asarray(prediction.label_ids)
    places = [(query, place) for query, place in np.ndindex(labels.shape) if labels[query, place] != PADDING]
    qrels = [ir_measures.Qrel(str(query), str(place), int(labels[query, place])) for query, place in places]
    metrics: dict[str, float] = {}
    for number, layer in enumerate(exits):
        run = [
            ir_measures.ScoredDoc(str(query), str(place), float(scores[query, place, number]))
            for query, place in places
        ]
        measured = ir_measures.calc_aggregate([RR @ 10, nDCG @ 10], qrels, run)
        metrics[f"layer_{layer}_MRR@10"], metrics[f"layer_{layer}_nDCG@10"] = measured[RR @ 10], measured[nDCG @ 10]
    for name in ("MRR@10", "nDCG@10"):
        metrics[name] = sum(metrics[f"layer_{layer}_{name}"] for layer in exits) / len(exits)
    return metrics
