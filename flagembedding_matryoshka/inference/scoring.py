"""From pairs to scores, and from scores to rankings."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flagembedding_matryoshka.inference.calibration import Normalizer
from flagembedding_matryoshka.inference.chunking import Candidates, CutDocument
from flagembedding_matryoshka.inference.engine import Task
from flagembedding_matryoshka.inference.fusion import fuse
from flagembedding_matryoshka.inference.inputs import Pairs
from flagembedding_matryoshka.inference.options import CALIBRATED
from flagembedding_matryoshka.inference.tasks import Call, Window, Work, batches_of, tasks_of, windows_of
from flagembedding_matryoshka.setting import Setting

Run = Callable[[Iterator[Task]], Generator[tuple[int, Any], None, None]]
"""Computes tasks, and yields the number and the result of each."""
Hit = dict[str, Any]


def score_pairs(run: Run, pairs: Pairs, call: Call, show_progress_bar: bool | None) -> Tensor:
    """(cutoff layers, pairs) float32 scores.

    Args:
        show_progress_bar: None shows one on work of more than a second.
    """
    scores = torch.empty(len(call.setting.cutoff_layers), len(pairs))
    results = _results(run, batches_of(pairs, call))
    with _progress(len(pairs), show_progress_bar) as progress, closing(results):
        for places, found in results:
            scores[:, places] = torch.tensor(found)
            progress.update(len(places))
    return scores


def score_lists(
    run: Run, lists: Iterable[Candidates], call: Call, total: int | None, show_progress_bar: bool | None
) -> Generator[list[Hit], None, None]:
    """Score lists of pairs.

    Only the lists of the current window and of the next one, which is tokenised meanwhile, are read ahead.

    Args:
        total: number of pairs of all lists; None if unknown.
        show_progress_bar: as in `score_pairs`.

    Yields:
        For each list a hit for each pair, in the order given: "score", in a cascade "cutoff_layer", with fusion
        "first_stage_score" and "fused_score", and "is_truncated" if the pair was cut.
    """
    with closing(_scored(run, lists, call, total, show_progress_bar)) as scored:
        for candidates, hits in scored:
            if call.fusion is not None:
                hits = fuse_hits(hits, candidates.first_stage_of_pairs or (), call.fusion)
            yield hits


def _scored(
    run: Run, lists: Iterable[Candidates], call: Call, total: int | None, show_progress_bar: bool | None
) -> Generator[tuple[Candidates, list[Hit]], None, None]:
    """Yield each list with its hits, without "first_stage_score"; only a cascade's hits have "fused_score"."""
    waiting: deque[Candidates] = deque()

    def noted() -> Iterator[Candidates]:
        for candidates in lists:
            waiting.append(candidates)
            yield candidates

    hits: list[Hit] = []
    with _progress(total, show_progress_bar) as progress, closing(windows_of(noted(), call)) as windows:
        for window in windows:
            # The caller may score other pairs between two rankings, so no task may be left unfinished.
            found = iter(_hits(run, window, call, progress))
            for portion in window.portions:
                hits += islice(found, len(portion.pairs))
                if portion.is_last:
                    yield waiting.popleft(), hits
                    hits = []


def _hits(run: Run, window: Window, call: Call, progress: Any) -> list[Hit]:
    hits: list[Hit] = [{} for _ in window.inputs]
    with closing(_results(run, tasks_of(window, call))) as results:
        for places, found in results:
            if call.is_cascade:
                of_task = [
                    {"score": score, "cutoff_layer": exit} | ({} if call.fusion is None else {"fused_score": fused})
                    for score, exit, fused in found
                ]
            else:
                of_task = [{"score": score} for score in found[0]]
            for place, hit in zip(places, of_task, strict=True):
                hits[place] = hit | ({"is_truncated": True} if window.inputs[place].is_cut else {})
            progress.update(len(places))
    return hits


def _results(run: Run, works: Iterable[Work]) -> Generator[tuple[Sequence[int], Any], None, None]:
    """The places and the result of each task, as they are done."""
    given: dict[int, Sequence[int]] = {}

    def tasks() -> Iterator[Task]:
        for number, (places, task) in enumerate(works):
            given[number] = places
            yield task

    with closing(run(tasks())) as results:
        for number, found in results:
            yield given.pop(number), found


def _progress(total: int | None, show_progress_bar: bool | None) -> Any:
    """A bar; of None one that shows itself on work of more than a second."""
    return tqdm(
        total=total,
        desc="scoring",
        unit="pair",
        delay=1.0 if show_progress_bar is None else 0.0,
        disable=show_progress_bar is False,
    )


def rank_lists(
    run: Run,
    lists: Iterable[Candidates],
    call: Call,
    top_k: int | None,
    return_documents: bool,
    normalize: Normalizer | None,
    min_score: float | None,
    total: int | None,
    show_progress_bar: bool | None,
) -> Generator[list[Hit], None, None]:
    """Yield the ranking of each query's documents, in the order of the queries, as soon as it is known.

    Arguments are those of `score_lists` and `ranking_of`.
    """
    with closing(_scored(run, lists, call, total, show_progress_bar)) as scored:
        for candidates, hits in scored:
            if candidates.cut is not None:
                hits = best_chunks(hits, candidates.cut)
            if call.fusion is not None:
                hits = fuse_hits(hits, candidates.first_stage or (), call.fusion)
            texts = candidates.documents if return_documents else None
            yield ranking_of(hits, texts, top_k, normalize, min_score, call.setting.depth)


def refuse_too_short(setting: Setting, query: int, count: int, top_k: int) -> None:
    """Raise ValueError if a cascade keeps fewer than `top_k` of a query's candidates."""
    if setting.kept(count) < top_k:
        raise ValueError(
            f"cascade {dict(setting.cascade)} keeps {setting.kept(count)} of the {count} candidates of query "
            f"{query}, fewer than top_k={top_k}."
        )


def best_first(hits: Sequence[Hit]) -> list[int]:
    """Return the indices of a list's hits, best first: by exit, then by fused score, then by score.

    Hits without an exit or without a fused score are compared by the rest.
    """

    def key(place: int) -> tuple[float, ...]:
        hit = hits[place]
        return -hit.get("cutoff_layer", 0), -hit.get("fused_score", 0.0), -hit["score"]

    return sorted(range(len(hits)), key=key)


def fuse_hits(hits: Sequence[Hit], first_stage: Sequence[float], weight: float) -> list[Hit]:
    """Add "first_stage_score" and "fused_score" to hits. The fused scores of a cascade's hits stay.

    Args:
        hits: hits of one query, with raw scores.
        first_stage: the first stage's score of each hit.
        weight: weight of the first stage.
    """
    scores = torch.tensor([hit["score"] for hit in hits], dtype=torch.float64)
    fused = fuse(scores, torch.tensor(first_stage, dtype=torch.float64), weight).tolist()
    return [
        {**hit, "first_stage_score": first, "fused_score": hit.get("fused_score", own)}
        for hit, first, own in zip(hits, first_stage, fused, strict=True)
    ]


def best_chunks(hits: Sequence[Hit], documents: Sequence[CutDocument]) -> list[Hit]:
    """For each document the hit of its best chunk, with "chunk", where that stands, and "is_truncated" as `CutDocument`
    says it.

    Args:
        hits: of all chunks of all documents, in their order.
    """
    left = iter(hits)
    found: list[Hit] = []
    for document in documents:
        own = list(islice(left, len(document.chunks)))
        best = best_first(own)[0]
        chunk = {"start": document.chunks[best].start, "end": document.chunks[best].end}
        found.append(own[best] | {"chunk": chunk} | ({"is_truncated": True} if document.is_truncated else {}))
    return found


def refuse_min_score(min_score: Any, call: Call) -> None:
    """Raise ValueError if `min_score` is no number, or would be compared with scores of several exits that are not
    calibrated."""
    if not isinstance(min_score, Real) or isinstance(min_score, bool) or math.isnan(min_score):
        raise ValueError(f"min_score is {min_score!r}, but must be a number.")
    if call.is_cascade and not math.isinf(min_score) and call.options.normalize != CALIBRATED:
        of_deadline = None if call.deadline is None else f"deadline_ms={call.deadline.seconds * 1000:g}"
        several = of_deadline or f"cascade={dict(call.setting.cascade)}"
        raise ValueError(
            f"min_score={min_score} beside {several}: scores of different exits do not mean the same, unless "
            f"normalize={CALIBRATED!r}."
        )


def ranking_of(
    hits: Sequence[Hit],
    documents: Sequence[str] | None,
    top_k: int | None,
    normalize: Normalizer | None,
    min_score: float | None,
    depth: int,
) -> list[Hit]:
    """Rank hits, best first.

    Args:
        documents: texts to include in the hits.
        top_k: number of hits to return at most; None is all hits. Hits that `min_score` leaves out do not count.
        min_score: hits with a lower normalised score are left out; None leaves out none.
        normalize: applied to what is returned: it makes scores equal that are not.
        depth: where scores were read that do not say so themselves.
    """
    ranking: list[Hit] = []
    for place in best_first(hits):
        if len(ranking) == top_k:
            break
        hit: Hit = {"corpus_id": place} | hits[place] | ({} if documents is None else {"text": documents[place]})
        if normalize is not None:
            hit["score"] = normalize(torch.tensor(hit["score"]), hit.get("cutoff_layer", depth)).item()
        if min_score is None or hit["score"] >= min_score:
            ranking.append(hit)
    return ranking
