import math

import hypothesis.strategies as st
import torch
from hypothesis import given

from flagembedding_matryoshka.inference.scoring import cut_batches
from flagembedding_matryoshka.models.batch import pack_pairs
from flagembedding_matryoshka.text.pairs import count_tokens
from tests.batches import tokenized_pairs


def in_one_batch(pairs):
    return [index for batch in cut_batches(pairs, len(pairs), math.inf) for index in batch]


@given(tokenized_pairs())
def test_pairs_of_a_query_stand_together_and_the_longest_first(pairs):
    order = in_one_batch(pairs)
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
    assert [index for batch in batches for index in batch] == in_one_batch(pairs)
    for number, batch in enumerate(batches):
        assert len(batch) == 1 or count_tokens([pairs[index] for index in batch]) <= max_tokens
        assert len(batch) <= batch_size
        if number + 1 < len(batches):
            longer = [*batch, batches[number + 1][0]]
            assert len(longer) > batch_size or count_tokens([pairs[index] for index in longer]) > max_tokens
