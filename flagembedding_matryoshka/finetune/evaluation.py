"""How well every exit ranks lists of which the relevant passages are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

from flagembedding_matryoshka.metrics import ndcg, rank_grades, reciprocal_rank

PADDING = -100
"""Value after the end of a list in scores and labels, as `Trainer` pads them."""


BEST_METRIC = "nDCG@10"


def rank_checkpoints(args: Any) -> None:
    """Let `TrainingArguments` evaluate whenever a checkpoint is written, where nothing else is asked for, and keep the
    one that ranks best: transformers' default is a loss, of which lists that are ranked have none."""
    if args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = BEST_METRIC, True
    if args.eval_strategy == "no":
        args.eval_strategy, args.eval_steps = args.save_strategy, args.save_steps


def ranking_metrics(prediction: EvalPrediction, exits: Sequence[int]) -> dict[str, float]:
    """Return MRR@10 and nDCG@10 of each exit, `layer_{exit}_MRR@10`, and their means over the exits, `MRR@10`.

    Among equal scores, irrelevant passages rank first.

    Args:
        prediction: scores (queries, longest list, exits) and labels (queries, longest list), 1 on relevant passages.

    Raises:
        ValueError: if a score is NaN; names its exit, query and passage.
    """
    scores, labels = np.asarray(prediction.predictions, dtype=float), np.asarray(prediction.label_ids)
    is_padding = labels == PADDING
    unordered = np.argwhere(np.isnan(scores) & ~is_padding[..., None])
    if len(unordered):
        query, place, number = unordered[0].tolist()
        raise ValueError(
            f"passage {place} of query {query} of the evaluation data (both counted from 0) has the score NaN at layer "
            f"{exits[number]}, and {len(unordered) - 1} more scores are NaN: the model has diverged. Lower the "
            "learning rate, or resume from an earlier checkpoint."
        )
    metrics: dict[str, float] = {}
    for number, layer in enumerate(exits):
        ranked = rank_grades(scores[..., number], labels, is_padding)
        metrics[f"layer_{layer}_MRR@10"] = float(reciprocal_rank(ranked, 10).mean())
        metrics[f"layer_{layer}_nDCG@10"] = float(ndcg(ranked, 10).mean())
    for name in ("MRR@10", "nDCG@10"):
        metrics[name] = sum(metrics[f"layer_{layer}_{name}"] for layer in exits) / len(exits)
    return metrics
