"""The work of a call, cut into tasks for the devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from flagembedding_matryoshka.inference.batching import by_query, count_tokens, cut_batches
from flagembedding_matryoshka.inference.engine import RunCascade
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair

T = TypeVar("T")
R = TypeVar("R")
PAIRS_TOKENIZED_AHEAD = 8192


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
    inputs: Sequence[TokenizedPair],
    owner: Sequence[int],
    options: ScoringOptions,
    setting: Setting,
    shares: int,
) -> tuple[list[RunCascade], list[list[int]]]:
    """A task for each of up to `shares` devices, each with all candidates of its queries, and the order of its results.

    Args:
        owner: the query of each input, as a number.
    """
    of_device: list[list[int]] = [[] for _ in range(shares)]
    for number, indices in enumerate(_grouped(owner)):
        of_device[number % shares].extend(indices)
    tasks, order = [], []
    for share in filter(None, of_device):
        own = [inputs[index] for index in share]
        batches = [
            [share[place] for place in batch]
            for batch in cut_batches(own, options.batch_size, options.max_tokens_per_batch)
        ]
        order.append(list(chain(*batches)))
        packs = [[inputs[index] for index in batch] for batch in batches]
        owners = [[owner[index] for index in batch] for batch in batches]
        tasks.append(RunCascade(packs, batches, owners, setting))
    return tasks, order


def _grouped(owner: Sequence[int]) -> list[list[int]]:
    """Indices of each owner's items."""
    groups: dict[int, list[int]] = {}
    for index, number in enumerate(owner):
        groups.setdefault(number, []).append(index)
    return list(groups.values())


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
