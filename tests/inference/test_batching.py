import hypothesis.strategies as st
import torch
from hypothesis import given

from flagembedding_matryoshka.inference.batching import by_prefix, count_tokens, cut_batches
from flagembedding_matryoshka.models.packing import pack_pairs
from tests.batches import tokenized_pair

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
