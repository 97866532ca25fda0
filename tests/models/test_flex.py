import random
import shutil

import pytest
import torch

from flagembedding_matryoshka.models.attention import Logits, _segment_by_segment, packed_attention
from flagembedding_matryoshka.models.batch import PackedBatch
from flagembedding_matryoshka.models.flex import flex_attention, runs_flex
from tests.batches import close

SCALING = 0.3
KINDS = [(2.0, None), (2.0, 40), (3.0, None), (3.0, 70)]
"""Caps and windows."""


def batches(device):
    """Rows of less than a block and of several, with and without queries that passages share."""
    draw = random.Random(0)
    for passages in (1, 9, 3, 14):
        lengths = [draw.randint(30, 90) for _ in range(passages)]
        yield packed_batch([20 + length for length in lengths], None, device)
        yield packed_batch([150, *lengths, 20, *lengths], [-1, *[0] * passages, -1, *[passages + 1] * passages], device)


def packed_batch(lengths, prefixes, device):
    lengths = torch.tensor(lengths)
    prefixes = None if prefixes is None else torch.tensor(prefixes)
    return PackedBatch(lengths * 0, lengths * 0, lengths, torch.device(device), prefixes)


def states(packed):
    """Query, key and value, (1, heads, total_tokens, head_dim)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, int(packed.lengths.sum()), 16) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_one_kernel_equals_each_segment_alone():
    for kind in KINDS:
        for packed in batches("cpu"):
            inputs = states(packed)
            with torch.inference_mode():
                found = flex_attention(*inputs, packed, SCALING, *kind)
                close(found, _segment_by_segment(*inputs, packed, Logits(SCALING, *kind)), 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_one_kernel_on_a_gpu_equals_each_segment_alone(dtype, tolerance):
    for cap, window in KINDS:
        for here, there in zip(batches("cpu"), batches("cuda"), strict=True):
            inputs = states(here)
            on_gpu = [part.to("cuda", dtype) for part in inputs]
            assert runs_flex(on_gpu[0])
            options = {"softcap": cap, "sliding_window": window, "compiled": True}
            with torch.inference_mode():
                found, _ = packed_attention(None, *on_gpu, None, SCALING, there, **options)
                close(found.float().cpu(), _segment_by_segment(*inputs, here, Logits(SCALING, cap, window)), tolerance)
