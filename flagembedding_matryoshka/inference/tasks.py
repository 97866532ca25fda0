"""The work of a call, cut into tasks for the devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby
from typing import TypeVar

from flagembedding_matryoshka.inference.batching import by_query, count_tokens, cut_batches
from flagembedding_matryoshka.inference.engine import RunCascade
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair

T = TypeVar("T")
R = TypeVar("R")
PAIRS_TOKENIZED_AHEAD = 8192
BATCHES_AT_ONCE = 16
"""Of a cascade, whose candidates must all wait for each other."""


def batches_of(
    pairs: Sequence[tuple[str, str]], tokenizer: PairTokenizer, options: ScoringOptions, shares: int
) -> Iterator[tuple[list[int], list[TokenizedPair]]]:
    """Indices and inputs of batches, at least `shares` of about equal size. Pairs are tokenised while those before
    them are computed."""

    def tokenize(start: int) -> list[TokenizedPair]:
        return options.tokenize(pairs[start : start + PAIRS_TOKENIZED_AHEAD], tokenizer)

    for window, inputs in enumerate(_one_ahead(tokenize, range(0, len(pairs), PAIRS_TOKENIZED_AHEAD))):
        max_tokens = options.max_tokens_per_batch
        if shares > 1:
            together = count_tokens([inputs[index] for index in by_query(inputs)])
            max_tokens = min(max_tokens, math.ceil(together / shares))
        for batch in cut_batches(inputs, options.batch_size, max_tokens):
            first = window * PAIRS_TOKENIZED_AHEAD
            yield [first + index for index in batch], [inputs[index] for index in batch]


def cascade_tasks(
    pairs: Sequence[tuple[str, str]],
    owner: Sequence[int],
    tokenizer: PairTokenizer,
    options: ScoringOptions,
    setting: Setting,
    shares: int,
) -> Iterator[tuple[list[int], RunCascade]]:
    """Tasks, each with all candidates of its queries, and the indices of its results, in their order.

    The states of a task lie in memory at once: it has as many queries as fill BATCHES_AT_ONCE batches, or one.

    Args:
        owner: the query of each pair, as a number; those of one query stand together.
        shares: devices, for each of which there is work, if there are as many queries.
    """

    def tokenize(part: range) -> tuple[range, list[TokenizedPair]]:
        return part, options.tokenize(pairs[part.start : part.stop], tokenizer)

    for part, inputs in _one_ahead(tokenize, whole_queries(owner, [1] * len(pairs), PAIRS_TOKENIZED_AHEAD)):
        max_tokens = BATCHES_AT_ONCE * options.max_tokens_per_batch
        if shares > 1:
            max_tokens = min(max_tokens, math.ceil(count_tokens(inputs) / shares))
        own, lengths = owner[part.start : part.stop], [len(pair.input_ids) for pair in inputs]
        for window in whole_queries(own, lengths, max_tokens):
            places = [
                [window[place] for place in batch]
                for batch in cut_batches(
                    inputs[window.start : window.stop], options.batch_size, options.max_tokens_per_batch
                )
            ]
            names = [[part[place] for place in batch] for batch in places]
            packs = [[inputs[place] for place in batch] for batch in places]
            owners = [[own[place] for place in batch] for batch in places]
            yield list(chain(*names)), RunCascade(packs, names, owners, setting)


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


def _one_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results of `function`, each computed in a thread while its predecessor is used."""
    with ThreadPoolExecutor(1) as thread:
        following: Future[R] | None = None
        for item in items:
            current, following = following, thread.submit(function, item)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()
