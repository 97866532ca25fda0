"""Cascades: after an exit the worst candidates of a query stop, and the others go deeper."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from flagembedding_matryoshka.inference.fusion import Fusion
from flagembedding_matryoshka.models.batch import copy_to_host
from flagembedding_matryoshka.models.decoder import PackedStates
from flagembedding_matryoshka.setting import Setting, share_of

T = TypeVar("T")


def run_cascade(
    score: Callable[[PackedStates, int], Tensor],
    batches: list[PackedStates],
    queries: Sequence[Sequence[int]],
    setting: Setting,
    fusion: Fusion | None = None,
) -> Generator[None, None, tuple[Tensor, Tensor, Tensor]]:
    """Score candidates, dropping the worst of each query after each stage.

    Args:
        score: runs a batch up to an exit and returns its (sequences,) float32 scores there, on any device.
        batches: the candidates' states before the first layer. Later the list holds the states of the remaining
            candidates alone, so that those of dropped ones are freed.
        queries: for each batch the number of each sequence's query.
        setting: a setting with one cutoff layer, where the remaining candidates are scored.
        fusion: after each stage candidates that still run are ranked by their fused scores; None ranks them by their
            scores.

    Yields:
        once a stage, when its batches and the copy of their scores are queued on the device. The scores are waited for
        when the generator continues.

    Returns:
        For all sequences, batch after batch, on the CPU: (sequences,) float32 scores, (sequences,) int64 exits where
        they were read, and (sequences,) float64 fused scores. A fused score standardises over the query's candidates
        that ran up to the same exit. Without fusion the scores stand in their place.
    """
    sizes = [len(numbers) for numbers in queries]
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1].tolist()
    owner = torch.tensor([number for numbers in queries for number in numbers])
    _, owner, candidates = owner.unique(return_inverse=True, return_counts=True)
    scores, exits = torch.zeros(len(owner)), torch.zeros(len(owner), dtype=torch.long)
    fused = scores if fusion is None else torch.zeros(len(owner), dtype=torch.float64)
    running = torch.ones(len(owner), dtype=torch.bool)
    alive = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    largest = max(sizes), max(states.packed.total_tokens for states in batches)
    (deepest,) = setting.cutoff_layers
    for layer, share in (*setting.cascade, (deepest, None)):
        if share is not None:
            kept = torch.tensor([share_of(share, count) for count in candidates.tolist()])
            if bool((owner[running].bincount(minlength=len(kept)) <= kept).all()):
                continue  # no candidate stops here, so no score is needed
        going = list(chain(*alive))
        on_host = copy_to_host(torch.cat([score(states, layer) for states in batches]))
        yield
        scores[going] = on_host()
        exits[going] = layer
        if fusion is not None:
            for number in owner[running].unique():
                places = (running & (owner == number)).nonzero()[:, 0]
                fused[places] = fusion.fuse(scores, places)
        if share is None:
            break
        running = _best_of_each_query(fused, scores, running, owner, kept)
        alive = _keep(batches, alive, running.tolist(), *largest)
    return scores, exits, fused


def finish(run: Generator[None, None, T]) -> T:
    """Run a generator to its end, and return what it returns."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def _keep(
    batches: list[PackedStates], alive: Sequence[list[int]], running: Sequence[bool], most: int, most_tokens: int
) -> list[list[int]]:
    """Keep the states of running sequences. Neighbouring batches join as long as they are no larger than allowed.

    Args:
        batches: the states of all sequences, replaced by those that are kept.
        alive: the numbers of each batch's sequences.
        running: for the number of each sequence, whether it is kept.
        most, most_tokens: sequences and tokens of a batch, at most.

    Returns:
        The numbers of the sequences of each batch.
    """
    kept: list[list[int]] = []
    groups: list[list[PackedStates]] = []
    tokens = 0
    for sequences in alive:
        states = batches.pop(0)
        places = [place for place, sequence in enumerate(sequences) if running[sequence]]
        if not places:
            continue
        if len(places) < len(sequences):
            states = states.select(places)
        own = states.packed.total_tokens
        if not kept or len(kept[-1]) + len(places) > most or tokens + own > most_tokens:
            kept.append([])
            groups.append([])
            tokens = 0
        kept[-1] += [sequences[place] for place in places]
        groups[-1].append(states)
        tokens += own
    while groups:
        group = groups.pop(0)
        batches.append(group[0] if len(group) == 1 else PackedStates.concat(group))
    return kept


def _best_of_each_query(fused: Tensor, scores: Tensor, running: Tensor, owner: Tensor, kept: Tensor) -> Tensor:
    """Choose the best running sequences of each query.

    Args:
        owner: (sequences,) int64, the query of each sequence: 0, 1, 2, …
        kept: (queries,) int64, the number of sequences to choose of each query, at most.

    Returns:
        (sequences,) bool.
    """
    places = running.nonzero()[:, 0]
    for values in (scores, fused):  # sorts are stable: by the fused score, and where that is equal by the score
        places = places[values[places].argsort(descending=True, stable=True)]
    places = places[owner[places].argsort(stable=True)]
    mine = owner[places]
    left = mine.bincount(minlength=len(kept))
    rank = torch.arange(len(places)) - (left.cumsum(0) - left)[mine]
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[places[rank < kept[mine]]] = True
    return chosen
