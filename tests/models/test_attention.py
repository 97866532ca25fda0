import pytest
import torch

from flagembedding_matryoshka.models.attention import (
    WIDTH_MULTIPLE,
    Logits,
    _in_groups,
    _in_products,
    _of_last_tokens,
    _segment_by_segment,
    group_indices,
    last_token_row,
    packed_attention,
)
from flagembedding_matryoshka.models.batch import PackedBatch, row_indices
from flagembedding_matryoshka.models.flash import runs_flash
from tests.batches import close

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = torch.tensor([5, 1, 9, 2])
SCALING = 0.3
KINDS = pytest.mark.parametrize(
    "kind", [{}, {"window": 3}, {"softcap": 0.5}, {"softcap": 0.5, "window": 3}], ids=["plain", "window", "cap", "both"]
)
HEADS = pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["all_heads", "grouped", "one_key"])


def packed_batch():
    return PackedBatch(LENGTHS, LENGTHS * 0, LENGTHS * 0, torch.device("cpu"))


def states(heads, scale=1.0):
    """Query, key and value, (1, heads, total_tokens, head_dim)."""
    generator = torch.Generator().manual_seed(0)
    query_heads, kv_heads = heads
    shapes = [(1, count, int(LENGTHS.sum()), 8) for count in (query_heads, kv_heads, kv_heads)]
    return [(scale * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]


def attention_map(query, key, softcap=None, window=None):
    """(heads, total_tokens, total_tokens): softmax over the earlier tokens of the same sequence."""
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    token = torch.arange(len(sequence))
    visible = (sequence[:, None] == sequence) & (token[:, None] >= token)
    if window is not None:
        visible &= token[:, None] - token < window
    repeated = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
    logits = SCALING * query[0] @ repeated.transpose(1, 2)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits.masked_fill(~visible, -torch.inf).softmax(-1)


def last_rows_of_map(query, key, **kind):
    """(total_tokens,)"""
    rows = attention_map(query, key, **kind)[:, LENGTHS.cumsum(0) - 1]
    return rows.sum((0, 1))


def gradients(output, inputs):
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


@HEADS
@KINDS
@pytest.mark.parametrize("learns", [True, False])
def test_equals_the_plain_softmax_inside_each_sequence(heads, kind, learns):
    query, key, value = states(heads)
    as_transformers_says = {"softcap": kind.get("softcap"), "sliding_window": kind.get("window")}
    with torch.set_grad_enabled(learns):
        output, no_map = packed_attention(
            None, query, key, value, None, SCALING, packed_batch(), **as_transformers_says
        )
    repeated = value[0].repeat_interleave(heads[0] // heads[1], 0)
    expected = (attention_map(query, key, **kind) @ repeated).transpose(0, 1)[None]
    assert no_map is None
    close(output, expected, 1e-6)
    if not learns:
        return
    for actual, wanted in zip(*(gradients(each, (query, key, value)) for each in (output, expected)), strict=True):
        close(actual, wanted)


@HEADS
@KINDS
def test_the_last_row_is_that_of_the_map(heads, kind):
    query, key, _ = states(heads)
    row, expected = (
        last_token_row(query[0], key[0], packed_batch(), Logits(SCALING, **kind)),
        last_rows_of_map(query, key, **kind),
    )
    close(row, expected, 1e-6)
    for actual, wanted in zip(*(gradients(each, (query, key)) for each in (row, expected)), strict=True):
        close(actual, wanted)


def test_attention_hands_out_the_last_row():
    query, key, value = states((4, 2))
    rows = []
    packed_attention(None, query, key, value, None, SCALING, packed_batch(), last_rows=rows)
    (row,) = rows
    torch.testing.assert_close(row, last_token_row(query[0], key[0], packed_batch(), Logits(SCALING)), atol=0, rtol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_sequence_shares_out_one_per_head_however_large_the_logits(scale):
    query, key, _ = states((4, 2), scale)
    row = last_token_row(query[0], key[0], packed_batch(), Logits(SCALING))
    close(torch.stack([part.sum() for part in row.split(LENGTHS.tolist())]), torch.full((len(LENGTHS),), 4.0))
    assert all(gradient.isfinite().all() for gradient in gradients(row, (query, key)))


@KINDS
@pytest.mark.parametrize("longest", [40, 257])
def test_half_precision_is_off_by_its_own_rounding(kind, longest):
    lengths = torch.tensor([7, longest, 21])
    packed = PackedBatch(lengths, lengths * 0, lengths * 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, int(lengths.sum()), 16) for heads in (4, 2, 2)]
    halves = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    options = {"softcap": kind.get("softcap"), "sliding_window": kind.get("window")}
    outputs = [
        packed_attention(None, *(part.to(dtype) for part in halves), None, SCALING, packed, **options)[0]
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert outputs[0].dtype == torch.bfloat16
    assert (outputs[0] - outputs[1]).std() < 2**-8 * outputs[1].std()


def test_the_row_of_half_precision_states_is_float32():
    query, key, _ = states((4, 2))
    row = last_token_row(query[0].bfloat16(), key[0].bfloat16(), packed_batch(), Logits(SCALING))
    assert row.dtype == torch.float32
    close(row, last_rows_of_map(query, key), 0.05)


@HEADS
@KINDS
@pytest.mark.parametrize("prefixes", [None, torch.tensor([-1, 0, 0, -1])], ids=["apart", "shared"])
def test_groups_of_padded_segments_equal_each_segment_alone(heads, prefixes, kind):
    packed = PackedBatch(LENGTHS, LENGTHS * 0, LENGTHS * 0, torch.device("cpu"), prefixes)
    groups, own = packed.indices(group_indices)
    assert len(groups) > 1 and own.unique().numel() == len(own) == LENGTHS.sum()
    inputs = states(heads)
    logits = Logits(SCALING, **kind)
    outputs = [attend(*inputs, packed, logits) for attend in (_in_groups, _segment_by_segment, _in_products)]
    close(outputs[0], outputs[1], 1e-6)
    close(outputs[2], outputs[1], 1e-6)
    wanted = gradients(outputs[1], inputs)
    for output in (outputs[0], outputs[2]):
        for actual, expected in zip(gradients(output, inputs), wanted, strict=True):
            close(actual, expected)


@pytest.mark.parametrize("window", [2, 4, 20])
def test_a_window_counts_tokens_of_the_shared_query_too(window):
    """A query of 5 tokens that two passages share, and the same sequences whole."""
    inputs = states((4, 2))
    zeros = torch.zeros(3, dtype=torch.long)
    shared = PackedBatch(
        torch.tensor([5, 0, 0]), zeros, torch.tensor([0, 4, 8]), torch.device("cpu"), torch.tensor([-1, 0, 0])
    )
    whole_tokens = torch.tensor([*range(5), *range(5, 9), *range(5), *range(9, 17)])
    lengths = torch.tensor([9, 13])
    whole = PackedBatch(lengths, lengths * 0, lengths * 0, torch.device("cpu"))
    shared_rows, whole_rows = [], []
    with torch.no_grad():
        given = [part[:, :, :17] for part in inputs]
        apart = [part[:, :, whole_tokens] for part in inputs]
        own, _ = packed_attention(None, *given, None, SCALING, shared, shared_rows, sliding_window=window)
        expected, _ = packed_attention(None, *apart, None, SCALING, whole, whole_rows, sliding_window=window)
    close(own, torch.cat([expected[:, :9], expected[:, 14:]], 1), 1e-6)
    close(shared_rows[0][5:], torch.cat([whole_rows[0][5:9], whole_rows[0][14:]]), 1e-6)


@HEADS
@KINDS
@pytest.mark.parametrize("prefixes", [None, torch.tensor([-1, 0, 0, -1])], ids=["apart", "shared"])
def test_the_last_tokens_alone_see_what_they_see_among_all(heads, prefixes, kind):
    packed = PackedBatch(LENGTHS, LENGTHS * 0, LENGTHS * 0, torch.device("cpu"), prefixes)
    query, key, value = inputs = states(heads)
    ends = packed.indices(row_indices).segment_ends
    alone = _of_last_tokens(query[0][:, ends], key[0], value[0], packed, Logits(SCALING, **kind), 0.0)
    among_all = _segment_by_segment(*inputs, packed, Logits(SCALING, **kind))[0, ends]
    close(alone, among_all, 1e-6)
    for actual, expected in zip(gradients(alone, inputs), gradients(among_all, inputs), strict=True):
        close(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["all_heads", "grouped", "one_key"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prefixes", [None, torch.tensor([-1, 0, 0, -1])], ids=["apart", "shared"])
def test_one_call_on_a_gpu_equals_each_segment_alone(heads, window, prefixes):
    inputs = states(heads)
    packed = PackedBatch(LENGTHS, LENGTHS * 0, LENGTHS * 0, torch.device("cpu"), prefixes)
    expected = _segment_by_segment(*inputs, packed, Logits(SCALING, window=window))
    there = [part.detach().cuda().bfloat16().requires_grad_() for part in inputs]
    packed = PackedBatch(LENGTHS, LENGTHS * 0, LENGTHS * 0, torch.device("cuda"), prefixes)
    assert runs_flash(there[0])
    output, _ = packed_attention(None, *there, None, SCALING, packed, sliding_window=window)
    close(output.float().cpu(), expected, 0.02)
    ends = packed.indices(row_indices).segment_ends
    of_last = there[0][:, :, ends], *there[1:]
    alone, _ = packed_attention(None, *of_last, None, SCALING, packed, only_last=True, sliding_window=window)
    close(alone.float().cpu(), expected[:, ends.cpu()], 0.02)
    for actual, wanted in zip(gradients(output.float().cpu(), there), gradients(expected, inputs), strict=True):
        close(actual.float().cpu(), wanted, 0.05)


def test_attention_that_is_not_understood_is_refused():
    arguments = (*states((4, 2)), None, SCALING, packed_batch())
    with pytest.raises(TypeError, match="s_aux"):
        packed_attention(None, *arguments, s_aux=torch.zeros(4))


def test_the_contexts_of_a_group_have_similar_lengths_and_its_width_fills_vectors():
    lengths = torch.arange(1, 90)
    groups, _ = PackedBatch(lengths, lengths * 0, lengths * 0, torch.device("cpu")).indices(group_indices)
    assert sum(len(group) for group in groups) == 89 and len(groups) <= 7
    for group in groups:
        contexts = [row.unique().numel() for row in group]
        assert max(contexts) <= 2 * min(contexts)
        assert group.shape[1] % WIDTH_MULTIPLE == 0 and 0 <= group.shape[1] - max(contexts) < WIDTH_MULTIPLE
