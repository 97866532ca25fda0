import copy
import gc
import shutil
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from flagembedding_matryoshka.models import attention, compiling
from flagembedding_matryoshka.models.attention import packed_attention
from flagembedding_matryoshka.models.batch import PackedBatch
from tests.backbones import BACKBONES, layer_wise, write_raw
from tests.batches import LENGTHS, WIDTHS, close, random_sequences, scores

pytestmark = pytest.mark.usefixtures("one_thread")
SEQUENCES = random_sequences(LENGTHS)


@pytest.fixture
def fresh_dynamo():
    """What was compiled and counted elsewhere is forgotten, and so is what is here."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def score_everything(model):
    """Batches of several sizes and lengths at all widths."""
    batches = [SEQUENCES, SEQUENCES[:3], SEQUENCES[2:], SEQUENCES[:1]]
    with torch.no_grad():
        return [scores(model, batch, **width) for width in WIDTHS for batch in batches]


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_layers_of_a_kind_are_one_graph_for_all_batches_and_widths(
    name, tiny_tokenizer, tmp_path, monkeypatch, fresh_dynamo
):
    model = layer_wise(write_raw(name, tiny_tokenizer, tmp_path))
    expected = score_everything(model)
    compiled = copy.deepcopy(model)
    # How operations are fused is not what is asked here.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled.model.compile_layers()
    for found, wanted in zip(score_everything(compiled), expected, strict=True):
        close(found, wanted, 1e-5)
    assert not counters["graph_break"]
    # EXAONE-4 tells every layer its window, SmolLM3 turns rotary embedding off in some layers
    switches = ("sliding_window", "is_sliding", "use_rope")
    kinds = {tuple(getattr(layer.self_attn, name, None) for name in switches) for layer in model.model.layers}
    # with the last tokens' row and without it
    assert counters["stats"]["unique_graphs"] <= 2 * len(kinds)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_fused_layers_score_the_same(name, tiny_tokenizer, tmp_path, monkeypatch, fresh_dynamo):
    model = layer_wise(write_raw(name, tiny_tokenizer, tmp_path))
    expected = score_everything(model)
    monkeypatch.setattr(attention, "runs_flex", lambda query: True)  # as on a GPU
    model.model.compile_layers()
    for found, wanted in zip(score_everything(model), expected, strict=True):
        close(found, wanted, 1e-5)


@pytest.mark.parametrize("last_row", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_the_operation_is_what_it_says_it_is(last_row, window):
    """Shapes, strides and effects, as torch's own checks see them."""
    lengths = torch.tensor([4, 2, 5])
    packed = PackedBatch(lengths, lengths * 0, lengths * 0, torch.device("cpu"))
    query, key, value = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8)
    name = compiling.name_of(packed)
    arguments = (query, key, value, name, last_row, False, 0.3, 0.0, None, window)
    torch.library.opcheck(compiling._attention, arguments, test_utils=("test_schema", "test_faketensor"))
    rows = [] if last_row else None
    expected, _ = packed_attention(None, query, key, value, None, 0.3, packed, rows, sliding_window=window)
    attended, row = compiling._attention(*arguments)
    assert torch.equal(attended, expected)
    assert torch.equal(row, rows[0]) if last_row else row.numel() == 0


def test_a_batch_that_is_gone_is_not_kept():
    gc.collect()
    before = len(compiling._batches)
    lengths = torch.tensor([4])
    packed = PackedBatch(lengths, lengths, lengths, torch.device("cpu"))
    assert compiling._batches[int(compiling.name_of(packed))] is packed
    del packed
    gc.collect()
    assert len(compiling._batches) == before
