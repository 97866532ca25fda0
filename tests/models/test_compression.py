import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flagembedding_matryoshka.models.batch import PackedBatch, row_indices
from flagembedding_matryoshka.models.compression import compress
from tests.batches import close, slow_compress

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = [(5, 17, 4), (3, 0, 4), (2, 1, 4), (0, 8, 0), (1, 0, 0)]
PART_LENGTHS = st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(0, 4)).filter(sum)
RATIOS = pytest.mark.parametrize("ratio", [2, 4, 8])


def packed_batch(lengths):
    return PackedBatch(*torch.tensor(lengths).T, torch.device("cpu"))


def states(lengths, seed=0):
    """Hidden states (1, total_tokens, hidden) and a positive attention row (total_tokens,)."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(map(sum, lengths))
    return torch.randn(1, total, 6, generator=generator), torch.rand(total, generator=generator) + 1e-3


def slow(hidden, row, lengths, ratio):
    """(fewer_tokens, hidden), sequence by sequence."""
    sizes = [sum(parts) for parts in lengths]
    merged = []
    for tokens, weights, (query, passage, _) in zip(hidden[0].split(sizes), row.split(sizes), lengths, strict=True):
        merged += slow_compress(tokens, weights, query, query + passage, ratio)
    return torch.stack(merged)


@given(st.lists(PART_LENGTHS, min_size=1, max_size=5), st.sampled_from([2, 4, 8]), st.integers(0, 99))
def test_equals_the_loop_over_groups(lengths, ratio, seed):
    hidden, row = states(lengths, seed)
    merged, packed = compress(hidden, row, packed_batch(lengths), ratio)
    close(merged[0], slow(hidden, row, lengths, ratio), 1e-6)
    expected = [[query, len(range(0, passage, ratio)), prompt] for query, passage, prompt in lengths]
    parts = (packed.query_lengths, packed.passage_lengths, packed.prompt_lengths)
    assert torch.stack(parts, 1).tolist() == expected
    assert packed.indices(row_indices).position_ids[0].tolist() == [
        place for parts in expected for place in range(sum(parts))
    ]


@RATIOS
def test_query_and_prompt_stay_as_they_are(ratio):
    hidden, row = states(LENGTHS)
    merged, packed = compress(hidden, row, packed_batch(LENGTHS), ratio)
    sizes = [sum(parts) for parts in LENGTHS]
    for before, after, (query, _, prompt) in zip(
        hidden[0].split(sizes), merged[0].split(packed.lengths.tolist()), LENGTHS, strict=True
    ):
        assert torch.equal(after[:query], before[:query])
        assert torch.equal(after[len(after) - prompt :], before[len(before) - prompt :])


@RATIOS
def test_a_sequence_is_compressed_alone_as_in_its_batch(ratio):
    hidden, row = states(LENGTHS)
    merged, packed = compress(hidden, row, packed_batch(LENGTHS), ratio)
    sizes = [sum(parts) for parts in LENGTHS]
    together = merged[0].split(packed.lengths.tolist())
    for tokens, weights, parts, expected in zip(
        hidden[0].split(sizes), row.split(sizes), LENGTHS, together, strict=True
    ):
        alone, _ = compress(tokens[None], weights, packed_batch([parts]), ratio)
        assert torch.equal(alone[0], expected)


def test_compressing_again_compresses_what_is_left():
    hidden, row = states(LENGTHS)
    once, packed = compress(hidden, row, packed_batch(LENGTHS), 2)
    left = torch.stack([packed.query_lengths, packed.passage_lengths, packed.prompt_lengths], 1).tolist()
    row = states(left, seed=1)[1]
    twice, _ = compress(once, row, packed, 4)
    close(twice[0], slow(once, row, left, 4), 1e-6)


@RATIOS
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-40, 1e-35, 1e-30, 1e-20])
def test_vanishing_weights_give_finite_means_and_gradients(ratio, tiny):
    hidden, weights = states(LENGTHS)
    hidden.requires_grad_()
    logits = weights.log().requires_grad_()
    merged, _ = compress(hidden, logits.exp() * tiny, packed_batch(LENGTHS), ratio)
    if tiny == 0:
        close(merged[0], slow(hidden, torch.zeros_like(weights), LENGTHS, ratio), 1e-6)
    merged.square().sum().backward()
    assert merged.isfinite().all() and hidden.grad.isfinite().all() and logits.grad.isfinite().all()


def test_one_group_that_vanishes_leaves_the_others_alone():
    hidden, row = states([(2, 6, 1)])
    expected = compress(hidden, row, packed_batch([(2, 6, 1)]), 2)[0][0]
    row[4:6] = 0
    merged = compress(hidden, row, packed_batch([(2, 6, 1)]), 2)[0][0]
    close(merged[3], hidden[0, 4:6].mean(0), 1e-6)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(merged[others], expected[others])


@RATIOS
def test_gradients_equal_those_of_the_loop(ratio):
    inputs = [tensor.requires_grad_() for tensor in states(LENGTHS)]
    merged, _ = compress(*inputs, packed_batch(LENGTHS), ratio)
    gradients = torch.autograd.grad(merged.square().sum(), inputs)
    expected = torch.autograd.grad(slow(*inputs, LENGTHS, ratio).square().sum(), inputs)
    for actual, wanted in zip(gradients, expected, strict=True):
        close(actual, wanted, 1e-4)


def test_half_precision_states_stay_so():
    hidden, row = states(LENGTHS)
    merged, _ = compress(hidden.bfloat16(), row, packed_batch(LENGTHS), 4)
    assert merged.dtype == torch.bfloat16
    close(merged[0].float(), slow(hidden, row, LENGTHS, 4), 0.02)
