import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.distributed.utils import _apply_to_tensors
from torch.utils._pytree import tree_leaves

from flagembedding_matryoshka.models.attention import context_indices, group_indices
from flagembedding_matryoshka.models.batch import (
    PackedBatch,
    apart_indices,
    copy_indices,
    in_one_copy,
    row_indices,
    segment_indices,
)
from flagembedding_matryoshka.models.compression import SlotsOf
from flagembedding_matryoshka.models.flash import flash_indices
from flagembedding_matryoshka.models.flex import BLOCK, flex_indices
from flagembedding_matryoshka.models.packing import pack
from tests.batches import LENGTHS, collate, random_sequences

PART_LENGTHS = st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 4)).filter(sum)


@given(st.lists(PART_LENGTHS, min_size=1, max_size=6))
def test_every_index_names_its_place_in_the_row(lengths):
    packed = PackedBatch(*torch.tensor(lengths).T, torch.device("cpu"))
    places = [(row, offset) for row, parts in enumerate(lengths) for offset in range(sum(parts))]
    starts = [places.index((row, 0)) for row in range(len(lengths))]
    assert packed.lengths.tolist() == [sum(parts) for parts in lengths]
    assert packed.max_seqlen == max(map(sum, lengths))
    assert packed.cu_seqlens.tolist() == [*starts, len(places)]
    assert packed.segments == list(zip(starts, [*starts[1:], len(places)], strict=True))
    assert packed.indices(segment_indices).own.tolist() == [row for row, _ in places]
    assert packed.total_tokens == len(places)
    row = packed.indices(row_indices)
    assert packed.offsets.tolist() == row.position_ids[0].tolist() == [offset for _, offset in places]
    assert [places[token] for token in row.last_tokens] == [(row, sum(parts) - 1) for row, parts in enumerate(lengths)]


def test_a_cast_of_a_layers_arguments_leaves_a_batch_and_its_indices_as_they_are():
    """FSDP2 casts them with this function before each layer, in mixed precision."""
    lengths = torch.tensor([3, 2])
    packed = PackedBatch(lengths, lengths, lengths, torch.device("cpu"))
    arguments = {"packed": packed, "hidden_states": torch.ones(1, 15, 4), "last_row": False}
    cast = _apply_to_tensors(lambda tensor: tensor.bfloat16(), arguments)
    assert cast["hidden_states"].dtype == torch.bfloat16
    assert cast["packed"] is packed and packed.indices(row_indices).position_ids.dtype == torch.int64


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3)), min_size=1, max_size=6))
def test_blocks_of_contexts_are_those_that_a_token_attends_to(groups):
    """Each group is a query of so many tokens, and that many passages that share it."""
    lengths, prefixes, number = [], [], 0
    for query, passages in groups:
        lengths += [query, *(100 * place + 1 for place in range(passages))]
        prefixes += [-1, *[number] * passages]
        number = len(lengths)
    lengths, prefixes = torch.tensor(lengths), torch.tensor(prefixes)
    packed = PackedBatch(lengths * 0, lengths * 0, lengths, torch.device("cpu"), prefixes)
    (segment, of_prefix), token = packed.indices(segment_indices), torch.arange(int(lengths.sum()))
    assert of_prefix.tolist() == [prefixes[s] if prefixes[s] >= 0 else s for s in segment.tolist()]
    in_context = (segment == segment[:, None]) | (segment == of_prefix[:, None])
    of, at = (in_context & (token <= token[:, None])).nonzero().unbind(1)
    *_, counts, blocks = packed.indices(flex_indices)
    seen = [(row, block) for row, count in enumerate(counts.tolist()) for block in blocks[row, :count].tolist()]
    assert seen == sorted(set(zip((of // BLOCK).tolist(), (at // BLOCK).tolist(), strict=True)))
    assert {tensor.dtype for tensor in (counts, blocks)} == {torch.int32}


def test_tensors_of_all_dtypes_come_out_of_one_copy_as_they_were():
    tensors = [
        torch.arange(5),
        torch.arange(3, dtype=torch.int32),
        torch.tensor([True, False, True]),
        torch.empty(0, dtype=torch.long),
        torch.arange(6).view(2, 3),
        torch.tensor(7),
    ]
    found = in_one_copy(tensors, torch.device("cpu"))
    for copy, tensor in zip(found, tensors, strict=True):
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype and copy.data_ptr() % 16 == 0
    assert len({copy.untyped_storage().data_ptr() for copy in found}) == 1


MAKERS = [
    row_indices,
    segment_indices,
    apart_indices,
    flash_indices,
    flex_indices,
    context_indices,
    group_indices,
    SlotsOf(2),
]


def shared_batch(device):
    lengths = torch.tensor([[2, 0, 0], [0, 7, 1], [0, 4, 2], [3, 1, 1]]).T
    return PackedBatch(*lengths, torch.device(device), torch.tensor([-1, 0, 0, -1]))


def test_indices_are_made_once_whoever_asks_for_them():
    packed, made = shared_batch("cpu"), []

    def make(batch):
        made.append(batch)
        return row_indices(batch)

    (other,) = copy_indices([(packed, make), (packed, make), (packed, row_indices)], packed.device, torch.tensor([5]))
    assert packed.indices(make) is packed.indices(make) and made == [packed] and other.tolist() == [5]
    for maker in MAKERS:
        assert packed.indices(maker) is packed.indices(maker)
    assert packed.compressed(2) is packed.compressed(2)


@pytest.mark.gpu
def test_indices_on_a_gpu_are_those_of_the_cpu():
    expected, found = shared_batch("cpu"), shared_batch("cuda")
    copy_indices([(found, make) for make in MAKERS], found.device)
    for make in MAKERS:
        for index, wanted in zip(tree_leaves(found.indices(make)), tree_leaves(expected.indices(make)), strict=True):
            assert index.is_cuda and index.dtype == wanted.dtype and torch.equal(index.cpu(), wanted)


def test_padding_again_gives_right_padded_rows():
    sequences = random_sequences(LENGTHS)
    right, left = collate(sequences), collate(sequences, "left")
    token_ids, packed = pack(**left)
    mask = packed.padded_attention_mask()
    torch.testing.assert_close(mask, right["attention_mask"])
    torch.testing.assert_close(packed.pad(token_ids[0][:, None])[..., 0], right["input_ids"] * mask)
