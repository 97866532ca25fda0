import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.batching import (
    PATIENCE,
    OutOfMemory,
    TokenLimit,
    by_prefix,
    computed,
    count_tokens,
    cut_batches,
)
from flagembedding_matryoshka.models.batch import pack_pairs
from tests.batches import close, out_of_memory_above, tokenized_pair

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_QUERY = [("a wing", f"passage {number}") for number in range(4)]
QUERIES = [[1], [1, 2], [3, 4, 5]]


@st.composite
def tokenized_pairs(draw, min_size=0):
    shapes = draw(st.lists(st.tuples(st.sampled_from(QUERIES), st.integers(0, 9)), min_size=min_size, max_size=12))
    return [tokenized_pair(query + [6] * passage + [7, 8], len(query), 2) for query, passage in shapes]


@given(tokenized_pairs())
def test_pairs_of_a_query_stand_together_and_the_longest_first(pairs):
    order = by_prefix(pairs)
    assert sorted(order) == list(range(len(pairs)))
    queries = [tuple(pairs[index].lead.ids.tolist()) for index in order]
    assert len(list(dict.fromkeys(queries))) == sum(a != b for a, b in zip(queries, [None, *queries], strict=False))
    lengths: dict[tuple[int, ...], list[int]] = {}
    for query, index in zip(queries, order, strict=True):
        lengths.setdefault(query, []).append(len(pairs[index]))
    assert all(group == sorted(group, reverse=True) for group in lengths.values())
    firsts = [group[0] for group in lengths.values()]
    assert firsts == sorted(firsts, reverse=True)


@given(tokenized_pairs(min_size=1))
def test_tokens_are_those_of_the_packed_row(pairs):
    token_ids, _ = pack_pairs(pairs, torch.device("cpu"))
    assert count_tokens(pairs) == token_ids.numel()


@given(tokenized_pairs(), st.integers(1, 40), st.integers(1, 5))
def test_batches_are_as_large_as_both_limits_allow(pairs, max_tokens, batch_size):
    batches = list(cut_batches(pairs, batch_size, max_tokens))
    assert [index for batch in batches for index in batch] == by_prefix(pairs)
    for number, batch in enumerate(batches):
        assert len(batch) == 1 or count_tokens([pairs[index] for index in batch]) <= max_tokens
        assert len(batch) <= batch_size
        if number + 1 < len(batches):
            longer = [*batch, batches[number + 1][0]]
            assert len(longer) > batch_size or count_tokens([pairs[index] for index in longer]) > max_tokens


def pair(tokens):
    return tokenized_pair(list(range(tokens)), 1, 1)


def more_than_there_is():
    return torch.empty(2**58)


def test_a_shortage_of_a_cpu_is_one_too_and_nothing_else_is():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        more_than_there_is()
    with pytest.raises(OutOfMemory, match="can't allocate memory"):
        computed(more_than_there_is)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        computed(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    assert computed(lambda: 5) == 5


def test_what_was_short_once_is_tried_again_and_ever_later_where_it_stays_short():
    limit = TokenLimit()
    for _ in range(5):  # several halvings of one shortage
        limit.halve([pair(20), pair(20)], 0, OutOfMemory())
    first = limit.tokens
    tried = []
    for batch in range(20 * PATIENCE):
        limit.fitted()
        if limit.tokens > first:
            tried.append(batch)
            limit.halve([pair(20), pair(20)], 0, OutOfMemory())
    waits = [later - earlier for earlier, later in pairwise(tried)]
    assert tried[0] == PATIENCE - 1 and waits == [PATIENCE * 2 ** (1 + n) for n in range(len(waits))] and len(waits) > 1


def test_a_first_shortage_after_many_batches_without_a_limit_waits_no_longer():
    limit = TokenLimit()
    for _ in range(PATIENCE):
        limit.fitted()
    limit.halve([pair(20), pair(20)], 0, OutOfMemory())
    first = limit.tokens
    for _ in range(PATIENCE):
        limit.fitted()
    assert limit.tokens == 2 * first


class SlowCount(int):
    """A number to which another thread could add while this one adds."""

    def __add__(self, other):
        time.sleep(0.001)
        return SlowCount(int(self) + other)


def test_no_batch_of_another_thread_is_lost_in_the_count():
    limit = TokenLimit()
    limit.halve([pair(20), pair(20)], 0, OutOfMemory())
    first, limit._fitted = limit.tokens, SlowCount()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: limit.fitted(), range(PATIENCE - 1)))
    assert limit.tokens == first
    limit.fitted()
    assert limit.tokens == 2 * first


def test_batches_grow_back_when_memory_is_free_again(tiny_layerwise_path, monkeypatch):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
    expected = reranker.compute_score(ONE_QUERY)
    model = reranker.model.model
    with monkeypatch.context() as short:
        short.setattr(model, "embed", out_of_memory_above(model, 1))
        close(reranker.compute_score(ONE_QUERY), expected)
    sizes = []
    embed = model.embed

    def noting(ids, packed, *others):
        sizes.append(len(packed.sequences))
        return embed(ids, packed, *others)

    monkeypatch.setattr(model, "embed", noting)
    for _ in range(PATIENCE):
        close(reranker.compute_score(ONE_QUERY), expected)
    assert sizes[0] == 1 and sizes[-1] == 4
