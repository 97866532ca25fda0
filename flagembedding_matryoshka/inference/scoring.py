"""From pairs to scores, and from scores to rankings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flagembedding_matryoshka.inference.engine import ScoreBatch, Task
from flagembedding_matryoshka.inference.normalizing import Normalizer
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.inference.tasks import batches_of, cascade_tasks
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import PairTokenizer

Run = Callable[[Iterator[Task]], Generator[tuple[int, Any], None, None]]
"""Computes tasks, and yields the number and the result of each."""
Hit = dict[str, Any]


def score_pairs(
    run: Run,
    pairs: Sequence[tuple[str, str]],
    tokenizer: PairTokenizer,
    options: ScoringOptions,
    setting: Setting,
    shares: int,
    show_progress_bar: bool | None,
) -> Tensor:
    """(cutoff layers, pairs) float32 scores, each batch on one of so many devices.

    Args:
        show_progress_bar: None shows one on work of more than a second.
    """
    scores = torch.empty(len(setting.cutoff_layers), len(pairs))
    batches: list[list[int]] = []

    def tasks() -> Iterator[Task]:
        for indices, inputs in batches_of(pairs, tokenizer, options, shares):
            batches.append(indices)
            yield ScoreBatch(inputs, indices, setting)

    with _progress(len(pairs), show_progress_bar) as progress, closing(run(tasks())) as results:
        for number, found in results:
            scores[:, batches[number]] = torch.tensor(found)
            progress.update(len(batches[number]))
    return scores


def score_cascade(
    run: Run,
    pairs: Sequence[tuple[str, str]],
    owner: Sequence[int],
    tokenizer: PairTokenizer,
    options: ScoringOptions,
    setting: Setting,
    shares: int,
    show_progress_bar: bool | None,
) -> list[Hit]:
    """ "score" and "cutoff_layer" of each pair, where it was read; `owner` says whose candidate it is."""
    order: list[list[int]] = []
    found: dict[int, Hit] = {}

    def tasks() -> Iterator[Task]:
        for indices, task in cascade_tasks(pairs, owner, tokenizer, options, setting, shares):
            order.append(indices)
            yield task

    with _progress(len(pairs), show_progress_bar) as progress, closing(run(tasks())) as results:
        for number, share in results:
            for index, (score, layer) in zip(order[number], share, strict=True):
                found[index] = {"score": score, "cutoff_layer": layer}
            progress.update(len(share))
    return [found[index] for index in range(len(pairs))]


def _progress(total: int, show_progress_bar: bool | None) -> Any:
    """A bar; of None one that shows itself on work of more than a second."""
    return tqdm(
        total=total,
        desc="scoring",
        unit="pair",
        delay=1.0 if show_progress_bar is None else 0.0,
        disable=show_progress_bar is False,
    )


def refuse_too_short(setting: Setting, owner: Sequence[int], top_k: int) -> None:
    """Raise ValueError if a cascade keeps fewer than `top_k` of a query's candidates that has as many."""
    for query, count in Counter(owner).items():
        if setting.kept(count) < min(top_k, count):
            raise ValueError(
                f"cascade {dict(setting.cascade)} keeps {setting.kept(count)} of the {count} candidates of query "
                f"{query}, fewer than top_k={top_k}."
            )


def rankings_of(
    lists: Sequence[Sequence[str]],
    found: Sequence[Hit],
    top_k: int | None,
    return_documents: bool,
    normalize: Normalizer | None,
    depth: int,
) -> list[list[Hit]]:
    """Each list's hits, the best first; with a cascade those that came further go before the others.

    Args:
        found: for all documents, list after list.
        normalize: applied to what is returned: it makes scores equal that are not.
        depth: where scores were read that do not say so themselves.
    """
    rankings: list[list[Hit]] = []
    rest = iter(found)
    for documents in lists:
        ranked: list[Hit] = [
            {"corpus_id": index} | next(rest) | ({"text": text} if return_documents else {})
            for index, text in enumerate(documents)
        ]
        ranked.sort(key=lambda document: (-document.get("cutoff_layer", 0), -document["score"]))
        rankings.append(ranked[:top_k])
    if normalize is not None:
        for hit in chain(*rankings):
            hit["score"] = normalize(torch.tensor(hit["score"]), hit.get("cutoff_layer", depth)).item()
    return rankings
