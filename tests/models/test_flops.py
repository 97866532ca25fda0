import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flagembedding_matryoshka import CostWiseMistralForCausalLM, MatryoshkaReranker, Setting
from flagembedding_matryoshka.models.flops import estimate_flops

QUERY, PASSAGE, PROMPT = torch.tensor([5, 3]), torch.tensor([17, 8]), torch.tensor([4, 4])


@pytest.mark.parametrize(
    ("cutoff_layers", "compress_layers", "ratio"), [([6], [], 1), ([3], [], 1), ([4, 6], [2, 3], 4), ([5], [5], 2)]
)
def test_equals_what_torch_counts(tiny_layerwise_path, cutoff_layers, compress_layers, ratio):
    model = CostWiseMistralForCausalLM.from_pretrained(tiny_layerwise_path, dtype=torch.float32)
    lengths = QUERY + PASSAGE + PROMPT
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    # the counter sees matrix products, but not inside the fused attention of a CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(
            mask.long(),
            mask,
            cutoff_layers=cutoff_layers,
            compress_layers=compress_layers,
            compress_ratio=ratio,
            query_lengths=QUERY,
            prompt_lengths=PROMPT,
        )
    setting = Setting.resolve(model.config, cutoff_layers, compress_layers, ratio)
    parts = QUERY, PASSAGE, PROMPT
    assert estimate_flops(model.config, setting, *parts, read_alone=(setting.depth,)) == counter.get_total_flops()


def test_depth_and_width_save(tiny_layerwise_path):
    config = CostWiseMistralForCausalLM.from_pretrained(tiny_layerwise_path).config

    def flops(**setting):
        return estimate_flops(config, Setting.resolve(config, **setting), QUERY, PASSAGE, PROMPT)

    full = flops()
    assert flops(cutoff_layers=3) < full
    assert flops(compress_layers=[2], compress_ratio=4) < flops(compress_layers=[2], compress_ratio=2) < full


@pytest.mark.parametrize("width", [{}, {"compress_layers": [1, 3], "compress_ratio": 2}])
def test_a_cascade_costs_what_torch_counts(tiny_layerwise_path, width):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=4)
    documents = ["wing " * (3 * number % 11) for number in range(10)]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ranked = reranker.rank("what about the wing", documents, cascade={3: 0.4, 5: 0.1}, **width)
    pairs = [("what about the wing", documents[item["corpus_id"]]) for item in ranked]
    depths = [item["cutoff_layer"] for item in ranked]
    assert sorted(depths) == [3] * 6 + [5] * 3 + [6]
    assert reranker.estimate_flops(pairs, depths, cutoff_layers=[3, 5, 6], **width) == counter.get_total_flops()
