"""Batches of pairs: pairs that share a prefix stand together, and a batch holds a limited number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from flagembedding_matryoshka.text.pairs import Prefix, TokenizedPair


def by_prefix(pairs: Sequence[TokenizedPair]) -> list[int]:
    """Return the indices of all pairs, pairs with one prefix together, the longest pairs and prefixes first."""
    lengths = list(map(len, pairs))
    groups: dict[Prefix, list[int]] = {}
    for index in sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True):
        groups.setdefault(pairs[index].prefix, []).append(index)
    return list(chain.from_iterable(groups.values()))


def _new_tokens(pair: TokenizedPair, before: TokenizedPair | None) -> int:
    """Return the number of tokens that `pair` adds to a batch that ends with `before`."""
    shared = before is not None and before.prefix == pair.prefix
    return pair.own_length if shared else len(pair)


def count_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Return the number of tokens of a batch, in which neighbours share their prefix."""
    return sum(_new_tokens(pair, pairs[place - 1] if place else None) for place, pair in enumerate(pairs))


def next_batch(pairs: Sequence[TokenizedPair], order: Sequence[int], max_tokens: float) -> list[int]:
    """Return the first index of `order`, and further ones while their pairs hold at most `max_tokens`."""
    batch: list[int] = []
    total = 0
    for index in order:
        total += _new_tokens(pairs[index], pairs[batch[-1]] if batch else None)
        if batch and total > max_tokens:
            break
        batch.append(index)
    return batch


def cut_batches(pairs: Sequence[TokenizedPair], batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of all pairs in batches of at most `batch_size` pairs and `max_tokens` tokens."""
    order = by_prefix(pairs)
    start = 0
    while start < len(order):
        batch = next_batch(pairs, order[start : start + batch_size], max_tokens)
        yield batch
        start += len(batch)


def count_input_tokens(pairs: Sequence[TokenizedPair]) -> tuple[int, list[int]]:
    """Count the tokens of one query's pairs.

    Returns:
        the number of tokens before the passages, which a batch holds once, and the number of each pair's other tokens.
    """
    shared = pairs[0].query_length if pairs else 0
    return shared, [len(pair) - pair.query_length for pair in pairs]
