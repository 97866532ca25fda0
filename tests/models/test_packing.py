import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flagembedding_matryoshka.models.attention import context_indices
from flagembedding_matryoshka.models.batch import PackedBatch, pack_pairs, row_indices
from flagembedding_matryoshka.models.packing import pack, share_queries
from tests.batches import LENGTHS, collate, random_sequences, tokenized_pair

QUERIES = [[1, 2], [3], [4, 5, 6]]
SHARING = st.lists(st.tuples(st.sampled_from(QUERIES), st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=8)


def packed_of(queries, passages, prompts):
    lengths = (torch.tensor(part) for part in (queries, passages, prompts))
    return PackedBatch(*lengths, torch.device("cpu"))


def test_neighbours_with_one_query_share_it():
    #                     a b x p | a b y z p | c x p
    token_ids = torch.tensor([[1, 2, 7, 9, 1, 2, 8, 7, 9, 3, 7, 9]])
    shared_ids, shared = share_queries(token_ids, packed_of([2, 2, 1], [1, 2, 1], [1, 1, 1]))
    assert shared_ids.tolist() == [[1, 2, 7, 9, 8, 7, 9, 3, 7, 9]]
    assert shared.cu_seqlens.tolist() == [0, 2, 4, 7, 10]
    assert shared.prefixes.tolist() == [-1, 0, 0, -1]
    assert shared.sequence_lengths.tolist() == [4, 5, 3]
    assert shared.indices(row_indices).position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 2]]


def test_queries_apart_or_different_are_left_alone():
    token_ids = torch.tensor([[1, 7, 9, 2, 7, 9, 1, 8, 9]])
    packed = packed_of([1, 1, 1], [1, 1, 1], [1, 1, 1])
    assert share_queries(token_ids, packed) == (token_ids, packed)


def test_sequences_that_are_all_query_are_left_alone():
    token_ids = torch.tensor([[1, 2, 1, 2]])
    packed = packed_of([2, 2], [0, 0], [0, 0])
    assert share_queries(token_ids, packed) == (token_ids, packed)


def tokenized(shapes):
    return [
        tokenized_pair(query + [7 + place] * passage + [8 + place] * prompt, len(query), prompt)
        for place, (query, passage, prompt) in enumerate(shapes)
    ]


def contexts(token_ids, packed):
    """What the last token of each sequence attends to: (token, position) pairs."""
    found = list(zip(token_ids[0].tolist(), packed.indices(row_indices).position_ids[0].tolist(), strict=True))
    parts = packed.context_tokens.split(packed.context_lengths.tolist())
    return [[found[token] for token in parts[segment]] for segment in packed.sequences]


@given(SHARING, st.data())
def test_a_shared_query_stands_once_in_front_of_its_sequences(shapes, data):
    pairs = tokenized(shapes)
    token_ids, packed = pack_pairs(pairs, torch.device("cpu"))
    assert contexts(token_ids, packed) == [list(zip(p.input_ids.tolist(), range(len(p)), strict=True)) for p in pairs]
    assert token_ids[0, packed.indices(row_indices).last_tokens].tolist() == [pair.input_ids[-1] for pair in pairs]
    assert packed.sequence_lengths.tolist() == [len(pair) for pair in pairs]
    assert packed.context_tokens[packed.indices(context_indices).own].tolist() == list(range(token_ids.numel()))
    queries = [len(list(group)) for _, group in itertools.groupby(shapes, key=lambda shape: shape[0])]
    assert len(packed.segments) == len(pairs) + sum(count > 1 for count in queries)

    chosen = data.draw(st.lists(st.sampled_from(range(len(pairs))), min_size=1, unique=True))
    part, tokens = packed.select(chosen)
    expected = [contexts(token_ids, packed)[sequence] for sequence in chosen]
    assert contexts(token_ids[:, tokens], part) == expected


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32])
def test_padding_of_either_side_is_dropped(side, mask_dtype):
    sequences = random_sequences(LENGTHS)
    batch = collate(sequences, side, extra=2)
    token_ids, packed = pack(**batch | {"attention_mask": batch["attention_mask"].to(mask_dtype)})
    assert token_ids.tolist() == [[token for sequence in sequences for token in sequence.ids]]
    parts = (packed.query_lengths, packed.passage_lengths, packed.prompt_lengths)
    assert torch.stack(parts, 1).tolist() == [list(lengths) for lengths in LENGTHS]


def test_without_mask_and_parts_all_is_one_query():
    input_ids = torch.arange(6).view(2, 3)
    token_ids, packed = pack(input_ids)
    assert token_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert packed.query_lengths.tolist() == [3, 3]
    assert packed.passage_lengths.tolist() == packed.prompt_lengths.tolist() == [0, 0]


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_a_row_is_accepted_if_its_tokens_are_one_run(row):
    runs = [run for run in "".join("01"[token] for token in row).split("0") if run]
    mask = torch.tensor([[True] * len(row), row])
    ids = torch.arange(mask.numel()).view(mask.shape)
    if len(runs) == 1:
        assert pack(ids, mask)[0].tolist() == [ids[mask].tolist()]
    else:
        message = r"row 1 of attention_mask has padding between tokens" if runs else r"row 1 of the batch has no token"
        with pytest.raises(ValueError, match=message):
            pack(ids, mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.arange(4)}, r"input_ids must be \(batch, length\).* got \(4,\)"),
        ({"input_ids": torch.empty(2, 0).long()}, r"at least one token, got \(2, 0\)"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask \(2, 3\) and input_ids \(2, 4\) differ in shape"),
        ({"query_lengths": None}, r"query_lengths and prompt_lengths go together"),
        ({"prompt_lengths": None}, r"query_lengths and prompt_lengths go together"),
        ({"query_lengths": [1]}, r"query_lengths must hold one length for each of the 2 rows, got \(1,\)"),
        ({"prompt_lengths": [[1, 1]]}, r"prompt_lengths must hold one length for each of the 2 rows, got \(1, 2\)"),
        ({"query_lengths": [1, -2]}, r"query_lengths must not be negative, got -2 in row 1"),
        ({"prompt_lengths": [-1, 1]}, r"prompt_lengths must not be negative, got -1 in row 0"),
        ({"query_lengths": [3, 4]}, r"row 1 has 4 tokens, fewer than query_lengths 4 \+ prompt_lengths 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    batch = {"input_ids": torch.zeros(2, 4).long(), "query_lengths": [1, 1], "prompt_lengths": [1, 1]}
    with pytest.raises(ValueError, match=message):
        pack(**batch | changes)
