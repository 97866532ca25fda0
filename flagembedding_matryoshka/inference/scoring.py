"""The way from pairs to scores, and from scores to rankings.

1. `windows_of` reads lists of pairs and tokenises them. Many pairs are tokenised in a thread, a window ahead.
2. `tasks_of` cuts a window into batches, see `cut_batches`, and batches make tasks.
3. An engine runs the tasks, or the workers of several devices do.
4. `score_pairs` writes the results into a tensor, at the places of their pairs. `rank_lists` makes hits of them, and
   orders these at the end.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby, islice
from numbers import Real
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Required, TypedDict

from flagembedding_matryoshka.inference.calibration import Normalizer
from flagembedding_matryoshka.inference.chunking import Candidates, CutDocument
from flagembedding_matryoshka.inference.engine import Task, TaskScores
from flagembedding_matryoshka.inference.fusion import Fusion, fuse
from flagembedding_matryoshka.inference.inputs import Inputs, Pairs
from flagembedding_matryoshka.inference.options import CALIBRATED, Call, RankingOptions
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import Prefix, TokenizedPair, count_tokens

T = TypeVar("T")
Run = Callable[[Iterator[Task]], Generator[tuple[Task, TaskScores], None, None]]
"""Computes tasks and yields each one with its results."""


class Span(TypedDict):
    """The characters of a document from `start` to `end`, which is excluded."""

    start: int
    end: int


class Hit(TypedDict, total=False):
    """A document in a ranking.

    Attributes:
        corpus_id: index of the document in its list.
        id: with a store, the id of the passage, if it has one.
        score: the re-ranker's score.
        text: the document, if asked for.
        cutoff_layer: with a cascade or a deadline, the exit where the score was read.
        first_stage_score, fused_score: with first-stage scores, these and the scores that documents rank by.
        is_truncated: True if the query or the document was cut; otherwise missing.
        chunk: with chunks, the place of the best one.
    """

    corpus_id: int
    id: str
    score: Required[float]
    text: str
    cutoff_layer: int
    first_stage_score: float
    fused_score: float
    is_truncated: bool
    chunk: Span


PAIRS_TOKENIZED_FIRST = 256
"""Pairs tokenised before the first batch, while devices wait. The number doubles each time, up to:"""
PAIRS_TOKENIZED_AHEAD = 8192
BATCHES_AT_ONCE = 16
"""Batches of a cascade's task. Their states are in memory at the same time."""
BATCHES_TOKENIZED_AHEAD = 64
"""Batches of lists in a window, for each device. The first ranking waits for a window."""
ROWS_READ_AHEAD = 2
"""Lists of `rank_iter` that are read before a window takes them."""
SECONDS_WITHOUT_INPUT = 0.05
"""If the source yields no list for this long, the lists that have been read are ranked."""
TOKENS_OF_A_PAIR = 256
"""Assumed length of a pair before it is tokenised."""
BAR: dict[str, Any] = {"desc": "scoring", "unit": "pair"}
"""The words of progress bars."""


@dataclass(frozen=True)
class ListSlice:
    """Pairs of one list that are scored together: the whole list, or a slice of a long list.

    Attributes:
        number: number of the list.
        is_last: whether the list ends here.
    """

    number: int
    candidates: Candidates
    pairs: Pairs
    is_last: bool


@dataclass(frozen=True)
class Window:
    """Neighbouring slices, tokenised.

    Attributes:
        first: number of the first pair in the whole call.
        inputs: the pairs of all slices.
    """

    slices: Sequence[ListSlice]
    first: int
    inputs: Inputs


def score_pairs(run: Run, pairs: Pairs, call: Call, show_progress_bar: bool | None) -> Tensor:
    """Score pairs at all cutoff layers.

    Args:
        show_progress_bar: None shows one on work of more than a second.

    Returns:
        (cutoff layers, pairs) float32, the layers in the order asked for.
    """
    scores = torch.empty(len(call.setting.cutoff_layers), len(pairs))
    windows: Generator[Window | None, None, None]
    windows = windows_of([Candidates((), pairs)], call, PAIRS_TOKENIZED_AHEAD)
    if len(pairs) > PAIRS_TOKENIZED_FIRST:
        windows = _one_ahead(windows)
    tasks = chain.from_iterable(tasks_of(window, call) for window in windows if window is not None)
    bar = tqdm(total=len(pairs), delay=0.0 if show_progress_bar else 1.0, disable=show_progress_bar is False, **BAR)
    with bar as progress, closing(windows), closing(run(tasks)) as results:
        for task, scored in results:
            (places,) = task.places
            scores[:, places] = torch.tensor(scored.scores)
            progress.update(len(places))
    return scores


def score_lists(
    run: Run, lists: Iterable[Candidates | None], call: Call, total: int | None, show_progress_bar: bool | None
) -> Generator[list[Hit], None, None]:
    """Score lists of pairs.

    Only the lists of the current window and of the next two are read ahead. One of these is tokenised meanwhile.

    Args:
        lists: the candidates of each query; None in between, if there is no other list yet.
        total: number of pairs of all lists; None if unknown.
        show_progress_bar: as in `score_pairs`.

    Yields:
        For each list a hit for each pair, in the order given: "score", in a cascade "cutoff_layer", with fusion
        "first_stage_score" and "fused_score", and "is_truncated" if the pair was cut.
    """
    with closing(_scored_lists(run, lists, call, total, show_progress_bar)) as scored:
        for candidates, hits in scored:
            if call.fusion is not None:
                hits = fuse_hits(hits, candidates.first_stage_of_pairs or (), call.fusion)
            yield hits


@dataclass
class WindowHits:
    """The hits of a window's pairs.

    Attributes:
        hits: the hit of each pair, in order; None for pairs without a score yet.
        missing: number of pairs without a score yet.
    """

    window: Window
    hits: list[Any]
    missing: int


def _scored_lists(
    run: Run, lists: Iterable[Candidates | None], call: Call, total: int | None, show_progress_bar: bool | None
) -> Generator[tuple[Candidates, list[Hit]], None, None]:
    """Yield each list with its hits, without "first_stage_score"; only a cascade's hits have "fused_score".

    With `total` None the caller may score other pairs between two lists. A run of several devices, whose workers are
    locked, then ends with its window.
    """
    tokens = BATCHES_TOKENIZED_AHEAD * call.options.max_tokens_per_batch * call.shares
    windows: Generator[Window | None, None, None]
    windows = windows_of(lists, call, min(max(1, tokens // TOKENS_OF_A_PAIR), PAIRS_TOKENIZED_AHEAD))
    goes_on = False
    if total is None or total > PAIRS_TOKENIZED_FIRST:
        windows = _one_ahead(windows)
        goes_on = call.shares == 1 or total is not None
    hits: list[Hit] = []
    bar = tqdm(total=total, delay=0.0 if show_progress_bar else 1.0, disable=show_progress_bar is False, **BAR)
    with (
        bar as progress,
        closing(windows),
        closing(_scored_windows(run, windows, call, goes_on, progress)) as scored,
    ):
        for complete in scored:
            rest = iter(complete.hits)
            for piece in complete.window.slices:
                hits += islice(rest, len(piece.pairs))
                if piece.is_last:
                    yield piece.candidates, hits
                    hits = []


def _scored_windows(
    run: Run, windows: Iterator[Window | None], call: Call, goes_on: bool, progress: Any
) -> Generator[WindowHits, None, None]:
    """Yield the hits of each window, in order.

    Args:
        windows: the windows; None in between, if the next one is not tokenised yet.
        goes_on: whether a run goes on with the next window if that is tokenised. Its first task is then queued before
            the results of the last one are waited for. Otherwise a window's hits follow the end of its run.
        progress: the progress bar.
    """
    begun: deque[WindowHits] = deque()

    def tasks(window: Window | None) -> Iterator[Task]:
        while window is not None:
            begun.append(WindowHits(window, [None] * len(window.inputs), len(window.inputs)))
            yield from tasks_of(window, call)
            window = next(windows, None) if goes_on else None

    for following in filter(None, windows):
        with closing(run(tasks(following))) as results:
            for task, scored in results:
                first = task.places[0][0]
                window_hits = next(one for one in begun if first < one.window.first + len(one.hits))
                pairs = zip(chain(*task.places), chain(*task.batches), strict=True)
                for number, (place, pair) in enumerate(pairs):
                    hit = Hit(score=scored.scores[0][number])
                    if task.owners is not None:
                        hit["cutoff_layer"] = scored.exits[number]
                    if task.fusion is not None:
                        hit["fused_score"] = scored.fused[number]
                    if pair.is_cut:
                        hit["is_truncated"] = True
                    window_hits.hits[place - window_hits.window.first] = hit
                count = sum(map(len, task.places))
                window_hits.missing -= count
                progress.update(count)
                while goes_on and begun and not begun[0].missing:
                    yield begun.popleft()
        while begun:
            yield begun.popleft()


def windows_of(lists: Iterable[Candidates | None], call: Call, most: int) -> Generator[Window, None, None]:
    """Read and tokenise lists, and yield them in windows. The lists of a window are neighbours and are scored together.

    A list that is longer than a window is cut into several windows. With a cascade it stays whole. A window ends early
    if the source has no other list yet, and may then be empty.

    Args:
        most: pairs of a window, at most. The first window has at most `PAIRS_TOKENIZED_FIRST`; the size doubles with
            each window.
    """
    source, end = iter(lists), object()
    candidates: Any = next(source, end)
    number, start, first, size = 0, 0, 0, min(PAIRS_TOKENIZED_FIRST, most)
    while candidates is not end:
        slices: list[ListSlice] = []
        count = 0
        while candidates is not None and candidates is not end:
            left = len(candidates.pairs) - start
            taken = left if call.is_cascade else min(left, size)
            if slices and count + taken > size:
                break
            slices.append(ListSlice(number, candidates, candidates.pairs[start : start + taken], taken == left))
            count, start = count + taken, start + taken
            if taken == left:
                candidates, number, start = next(source, end), number + 1, 0
        pairs: Any = [pair for piece in slices for pair in piece.pairs]
        yield Window(slices, first, call.tokenize(pairs, first))
        first += count
        if candidates is None:
            candidates = next(source, end)
        else:
            size = min(2 * size, most)


def tasks_of(window: Window, call: Call) -> Iterator[Task]:
    """Yield the tasks that compute all pairs of a window.

    Without a cascade each batch is a task, and the window has at least a batch for each share. A cascade's task holds
    the states of all its queries in memory. Its queries fill up to BATCHES_AT_ONCE batches, at least one query. The
    window has at least `call.shares` tasks if it has that many queries. With a deadline each query is a task.
    """
    inputs, first = window.inputs, window.first
    batch_size, max_tokens = call.options.batch_size, call.options.max_tokens_per_batch
    if not call.is_cascade:
        if call.shares > 1:
            in_one = cut_batches(inputs, len(inputs), math.inf)
            together = sum(count_tokens([inputs[place] for place in batch]) for batch in in_one)
            max_tokens = min(max_tokens, math.ceil(together / call.shares))
        for batch in cut_batches(inputs, batch_size, max_tokens):
            yield Task([[inputs[place] for place in batch]], [[first + place for place in batch]], call.setting)
        return
    owner = [piece.number for piece in window.slices for _ in piece.pairs]
    first_stage: list[float] = []
    if call.fusion is not None:  # a piece is then a whole list
        for piece in window.slices:
            first_stage += piece.candidates.first_stage_of_pairs or ()
    limit = BATCHES_AT_ONCE * max_tokens
    if call.deadline is not None:
        limit = 0
    elif call.shares > 1:
        limit = min(limit, math.ceil(count_tokens(inputs) / call.shares))
    for part in whole_queries(owner, [pair.length for pair in inputs], limit):
        own = inputs[part.start : part.stop]
        batches = [[part[place] for place in batch] for batch in cut_batches(own, batch_size, max_tokens)]
        fusion = None
        if call.fusion is not None:
            fusion = Fusion(call.fusion, [first_stage[place] for place in chain(*batches)])
        yield Task(
            [[inputs[place] for place in batch] for batch in batches],
            [[first + place for place in batch] for batch in batches],
            call.setting,
            [[owner[place] for place in batch] for batch in batches],
            call.deadline,
            fusion,
        )


def cut_batches(pairs: Sequence[TokenizedPair], batch_size: int, max_tokens: float) -> Iterator[list[int]]:
    """Yield the indices of pairs in batches of at most `batch_size` pairs and `max_tokens` tokens, at least one pair.

    Pairs with one prefix stand together, the longest pairs and prefixes first.
    """
    lengths = [pair.length for pair in pairs]
    groups: dict[Prefix, list[int]] = {}
    for index in sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True):
        groups.setdefault(pairs[index].prefix, []).append(index)
    batch: list[int] = []
    tokens = 0
    for index in chain.from_iterable(groups.values()):
        pair = pairs[index]
        shares = bool(batch) and pairs[batch[-1]].prefix == pair.prefix
        tokens += pair.own_length if shares else pair.length
        if batch and (len(batch) == batch_size or tokens > max_tokens):
            yield batch
            batch, tokens = [], pair.length
        batch.append(index)
    if batch:
        yield batch


def whole_queries(owner: Sequence[int], sizes: Sequence[int], limit: float) -> Iterator[range]:
    """Yield ranges of neighbouring pairs that hold whole queries.

    The sizes in a range sum to at most `limit`, unless it holds a single query.

    >>> list(whole_queries([0, 0, 1, 2, 2], [4, 4, 1, 9, 9], limit=10))
    [range(0, 3), range(3, 5)]
    """
    start = end = total = 0
    for _, group in groupby(owner):
        following = end + sum(1 for _ in group)
        size = sum(sizes[end:following])
        if end > start and total + size > limit:
            yield range(start, end)
            start, total = end, 0
        end, total = following, total + size
    if end > start:
        yield range(start, end)


def _one_ahead(items: Iterator[T]) -> Generator[T | None, None, None]:
    """Yield items, each made in a thread while its predecessor is used.

    If the next item is not ready, or cannot be made, None comes before it, or before the exception.
    """
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        following: Future[T] = thread.submit(next, items, end)
        while True:
            if not following.done() or following.exception() is not None:
                yield None
            if (current := following.result()) is end:
                return
            following = thread.submit(next, items, end)
            yield current


class ReadAhead(Iterable["T | None"]):
    """Reads an iterable in a thread of its own, `ROWS_READ_AHEAD` items ahead.

    Iteration yields the items. It yields None while the source has no other item yet. The thread ends with the source,
    with its error, or after `stop`.
    """

    def __init__(self, source: Iterable[T]) -> None:
        self._source = source
        self._read: SimpleQueue[T | BaseException] = SimpleQueue()
        self._room = threading.Semaphore(ROWS_READ_AHEAD)
        self._end: Any = StopIteration()
        self._is_stopped = False

    def __iter__(self) -> Iterator[T | None]:
        # A daemon: the source may wait for ever, and the interpreter does not wait for it.
        threading.Thread(target=self._fill, name="rank_iter reads", daemon=True).start()
        while True:
            try:
                item = self._read.get(timeout=SECONDS_WITHOUT_INPUT)
            except Empty:
                yield None
                continue
            if item is self._end:
                return
            if isinstance(item, BaseException):
                raise item
            self._room.release()
            yield item

    def _fill(self) -> None:
        try:
            items = iter(self._source)
            while self._room.acquire() and not self._is_stopped:
                self._read.put(next(items, self._end))
        except BaseException as error:
            self._read.put(error)

    def stop(self) -> None:
        """Read no further item."""
        self._is_stopped = True
        self._room.release()


def rank_lists(
    run: Run,
    lists: Iterable[Candidates | None],
    call: Call,
    options: RankingOptions,
    normalize: Normalizer | None,
    total: int | None,
    show_progress_bar: bool | None,
) -> Generator[list[Hit], None, None]:
    """Yield the ranking of each query's documents, best first, in the order of the queries, as soon as it is known.

    Args:
        options: their `top_k` counts the hits whose normalised score is at least `min_score`.
        normalize: function of the returned scores; None returns raw scores. Hits are ordered by raw scores, because
            normalised ones may be equal by rounding.
        run, lists, call, total, show_progress_bar: as in `score_lists`.
    """
    (deepest,) = call.setting.cutoff_layers
    with closing(_scored_lists(run, lists, call, total, show_progress_bar)) as scored:
        for candidates, hits in scored:
            if candidates.cut is not None:
                hits = best_chunks(hits, candidates.cut)
            if call.fusion is not None:
                hits = fuse_hits(hits, candidates.first_stage or (), call.fusion)
            ranking: list[Hit] = []
            for place in best_first(hits):
                if len(ranking) == options.top_k:
                    break
                hit: Hit = {"corpus_id": place, **hits[place]}
                if candidates.ids and (name := candidates.ids[place]) is not None:
                    hit["id"] = name
                if options.return_documents:
                    hit["text"] = candidates.documents[place]
                if normalize is not None:
                    hit["score"] = normalize(torch.tensor(hit["score"]), hit.get("cutoff_layer", deepest)).item()
                if options.min_score is None or hit["score"] >= options.min_score:
                    ranking.append(hit)
            yield ranking


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

    keys = [(-hit.get("cutoff_layer", 0), -hit.get("fused_score", 0.0), -hit["score"]) for hit in hits]
    return sorted(range(len(hits)), key=keys.__getitem__)


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
    """Return for each document the hit of its best chunk, with "chunk" and, if it is true, "is_truncated".

    Args:
        hits: hits of all chunks of all documents, in order.
    """
    left = iter(hits)
    found: list[Hit] = []
    for document in documents:
        own = list(islice(left, len(document.chunks)))
        best = best_first(own)[0]
        chunk: Span = {"start": document.chunks[best].start, "end": document.chunks[best].end}
        hit: Hit = {**own[best], "chunk": chunk}
        if document.is_truncated:
            hit["is_truncated"] = True
        found.append(hit)
    return found


def refuse_min_score(min_score: Any, call: Call) -> None:
    """Raise ValueError if `min_score` is not a number, or scores of several exits are not calibrated."""
    if not isinstance(min_score, Real) or isinstance(min_score, bool) or math.isnan(min_score):
        raise ValueError(f"min_score is {min_score!r}, but must be a number.")
    if call.is_cascade and not math.isinf(min_score) and call.options.normalize != CALIBRATED:
        of_deadline = None if call.deadline is None else f"deadline_ms={call.deadline.seconds * 1000:g}"
        several = of_deadline or f"cascade={dict(call.setting.cascade)}"
        raise ValueError(
            f"min_score={min_score} beside {several}: scores of different exits do not mean the same, unless "
            f"normalize={CALIBRATED!r}."
        )
