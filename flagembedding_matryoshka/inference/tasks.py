"""The work of a call, cut into tasks for the devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, TypeVar

from flagembedding_matryoshka.inference.batching import by_prefix, count_tokens, cut_batches
from flagembedding_matryoshka.inference.chunking import Candidates
from flagembedding_matryoshka.inference.deadline import Deadline
from flagembedding_matryoshka.inference.engine import RunCascade, RunUntil, ScoreBatch, Task
from flagembedding_matryoshka.inference.fusion import Fusion
from flagembedding_matryoshka.inference.inputs import Inputs, Pairs, are_tokenized
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import PairTokenizer

T = TypeVar("T")
R = TypeVar("R")
PAIRS_TOKENIZED_FIRST = 256
"""Pairs tokenised before the first batch, while devices wait. The number doubles each time, up to:"""
PAIRS_TOKENIZED_AHEAD = 8192
BATCHES_AT_ONCE = 16
"""Batches of a cascade's task, whose candidates wait for each other."""
BATCHES_TOKENIZED_AHEAD = 64
"""Batches of lists in a window, for each device. The first ranking waits for a window, and devices wait at its end."""
TOKENS_OF_A_PAIR = 256
"""Assumed length of a pair before it is tokenised."""


@dataclass(frozen=True)
class Call:
    """Options of a call, for all of its pairs.

    Attributes:
        shares: number of devices that the work is split among.
        is_cascade: whether candidates of a list wait for each other.
        deadline: deadline of each list; it starts when the list is computed, unless it has started; None is none.
        fusion: weight of the first stage's scores, which all lists then have; None is no fusion.
    """

    tokenizer: PairTokenizer
    options: ScoringOptions
    setting: Setting
    shares: int
    is_cascade: bool = False
    deadline: Deadline | None = None
    fusion: float | None = None

    def tokenize(self, pairs: Pairs) -> Inputs:
        """Pairs that are tokenised already stay as they are."""
        return pairs if are_tokenized(pairs) else self.options.tokenize(pairs, self.tokenizer)


@dataclass(frozen=True)
class Portion:
    """Candidates of one query that are scored together: the whole list, or a slice of a long list.

    Attributes:
        number: number of the list.
        pairs: their pairs.
        is_last: whether the list ends here.
        first_stage: the first stage's score of each candidate if candidates are dropped by fused scores; otherwise
            empty.
    """

    number: int
    pairs: Pairs
    is_last: bool
    first_stage: Sequence[float] = ()


@dataclass(frozen=True)
class Window:
    """Neighbouring portions, tokenised.

    Attributes:
        first: number of the first pair in the whole call.
        inputs: the pairs of all portions.
    """

    portions: Sequence[Portion]
    first: int
    inputs: Inputs


Work = tuple[Sequence[int], Task]
"""A task, and the places of the pairs that it has results for, in their order."""


def batches_of(pairs: Pairs, call: Call) -> Iterator[Work]:
    """All pairs in batches, at least one for each share, of about equal size. Pairs are tokenised while those before
    them are computed."""

    def parts() -> Iterator[slice]:
        start, sizes = 0, _growing(PAIRS_TOKENIZED_AHEAD)
        while start < len(pairs):
            part = slice(start, start + next(sizes))
            yield part
            start = part.stop

    def tokenize(part: slice) -> tuple[int, Inputs]:
        return part.start, call.tokenize(pairs[part])

    for start, inputs in _one_ahead(tokenize, parts()):
        for batch in _cut(inputs, call):
            names = [start + place for place in batch]
            yield names, ScoreBatch([inputs[place] for place in batch], names, call.setting)


def windows_of(lists: Iterable[Candidates], call: Call) -> Generator[Window, None, None]:
    """Yield windows of neighbouring lists, the lists of a window to be scored together.

    A window is read and tokenised while the previous one is computed. A list longer than a window has several windows,
    unless it is a cascade's.
    """
    tokens = BATCHES_TOKENIZED_AHEAD * call.options.max_tokens_per_batch * call.shares
    sizes = _growing(min(max(1, tokens // TOKENS_OF_A_PAIR), PAIRS_TOKENIZED_AHEAD))

    def filled() -> Iterator[list[Portion]]:
        portions: list[Portion] = []
        count, size = 0, next(sizes)
        for number, candidates in enumerate(lists):
            pairs, end, is_last = candidates.pairs, 0, False
            fuses = call.is_cascade and call.fusion is not None
            first_stage = (candidates.first_stage_of_pairs if fuses else None) or ()
            while not is_last:
                start, end = end, len(pairs) if call.is_cascade else end + size
                is_last = end >= len(pairs)
                portion = Portion(number, pairs[start:end], is_last, first_stage)
                if portions and count + len(portion.pairs) > size:
                    yield portions
                    portions, count, size = [], 0, next(sizes)
                portions.append(portion)
                count += len(portion.pairs)
        if portions:
            yield portions

    def numbered() -> Iterator[tuple[int, list[Portion]]]:
        first = 0
        for portions in filled():
            yield first, portions
            first += sum(len(portion.pairs) for portion in portions)

    def tokenize(work: tuple[int, list[Portion]]) -> Window:
        first, portions = work
        pairs: Any = [pair for portion in portions for pair in portion.pairs]
        return Window(portions, first, call.tokenize(pairs))

    return _one_ahead(tokenize, numbered())


def tasks_of(window: Window, call: Call) -> Iterator[Work]:
    """Yield the tasks that compute all pairs of a window.

    A cascade's task holds the states of all its queries in memory. Its queries fill up to BATCHES_AT_ONCE batches, at
    least one query. The window has at least `call.shares` tasks if it has that many queries. With a deadline each query
    is a task.
    """
    inputs = window.inputs
    if not call.is_cascade:
        for places in _cut(inputs, call):
            pairs = [inputs[place] for place in places]
            yield places, ScoreBatch(pairs, [window.first + place for place in places], call.setting)
        return
    owner = [portion.number for portion in window.portions for _ in portion.pairs]
    first_stage = list(chain.from_iterable(portion.first_stage for portion in window.portions))
    max_tokens = BATCHES_AT_ONCE * call.options.max_tokens_per_batch
    if call.deadline is not None:
        max_tokens = 0
    elif call.shares > 1:
        max_tokens = min(max_tokens, math.ceil(count_tokens(inputs) / call.shares))
    for part in whole_queries(owner, list(map(len, inputs)), max_tokens):
        own = inputs[part.start : part.stop]
        batches = [
            [part[place] for place in batch]
            for batch in cut_batches(own, call.options.batch_size, call.options.max_tokens_per_batch)
        ]
        packs = [[inputs[place] for place in batch] for batch in batches]
        names = [[window.first + place for place in batch] for batch in batches]
        fusion = None
        if call.fusion is not None:
            fusion = Fusion(call.fusion, [first_stage[place] for place in chain(*batches)])
        if call.deadline is not None:
            yield list(chain(*batches)), RunUntil(packs, names, call.setting, call.deadline, fusion)
            continue
        owners = [[owner[place] for place in batch] for batch in batches]
        yield list(chain(*batches)), RunCascade(packs, names, owners, call.setting, fusion)


def _cut(inputs: Inputs, call: Call) -> Iterator[list[int]]:
    """All places in batches, at least one for each share."""
    max_tokens = call.options.max_tokens_per_batch
    if call.shares > 1:
        together = count_tokens([inputs[place] for place in by_prefix(inputs)])
        max_tokens = min(max_tokens, math.ceil(together / call.shares))
    return cut_batches(inputs, call.options.batch_size, max_tokens)


def whole_queries(owner: Sequence[int], sizes: Sequence[int], limit: float) -> Iterator[range]:
    """Ranges of neighbours whose sizes sum to at most `limit`, unless a single query's do, and which cut no query.

    >>> list(whole_queries([0, 0, 1, 2, 2], [4, 4, 1, 9, 9], limit=10))
    [range(0, 3), range(3, 5)]
    """
    start = end = total = 0
    for _, group in groupby(owner):
        behind = end + sum(1 for _ in group)
        size = sum(sizes[end:behind])
        if end > start and total + size > limit:
            yield range(start, end)
            start, total = end, 0
        end, total = behind, total + size
    if end > start:
        yield range(start, end)


def _growing(limit: int) -> Iterator[int]:
    """How many pairs are tokenised in one go, time after time.

    >>> from itertools import islice
    >>> list(islice(_growing(500), 4))
    [256, 500, 500, 500]
    """
    size = min(PAIRS_TOKENIZED_FIRST, limit)
    while True:
        yield size
        size = min(2 * size, limit)


def _one_ahead(function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """Results of `function`, each computed in a thread while its predecessor is used."""
    with ThreadPoolExecutor(1) as thread:
        following: Future[R] | None = None
        for item in items:
            current, following = following, thread.submit(function, item)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()
