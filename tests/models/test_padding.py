import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flagembedding_matryoshka.models.padding import pack
from tests.batches import LENGTHS, collate, random_sequences


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
