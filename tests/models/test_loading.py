import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralForCausalLM

from flagembedding_matryoshka import CostWiseMistralForCausalLM, MatryoshkaReranker
from flagembedding_matryoshka.models.loading import inspect_checkpoint
from flagembedding_matryoshka.text.pairs import find_head_token_id

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("how does a wing lift", "air flows faster over the upper side of a wing."), ("Yes", "no")]


def scores(path, **kwargs):
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu", **kwargs)
    return torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=reranker.config.exit_layers))


def test_a_raw_mistral_gets_its_exits_and_heads(tiny_raw_model_path, tiny_tokenizer):
    reranker = MatryoshkaReranker(str(tiny_raw_model_path), start_layer=2, layer_sep=2, dtype="float32", devices="cpu")
    assert reranker.config.exit_layers == [2, 4, 6]
    raw = inspect_checkpoint(str(tiny_raw_model_path), from_raw=True)
    assert raw.from_raw and raw.config.exit_layers == [4, 5, 6]
    row = MistralForCausalLM.from_pretrained(tiny_raw_model_path).lm_head.weight[find_head_token_id(tiny_tokenizer)]
    for head in reranker.model.lm_head:
        torch.testing.assert_close(head.linear_head.weight[0], row, rtol=0, atol=0)


def test_insisting_on_the_other_kind_is_refused(tiny_raw_model_path, tiny_layerwise_path):
    with pytest.raises(ValueError, match=r"from_raw=False, but .* is a raw checkpoint without heads"):
        inspect_checkpoint(str(tiny_raw_model_path), from_raw=False)
    with pytest.raises(ValueError, match=r"from_raw=True, but .* is a layer-wise checkpoint"):
        inspect_checkpoint(str(tiny_layerwise_path), from_raw=True)
    with pytest.raises(ValueError, match=r"start_layer=3, but the heads of .* were trained with start_layer=2"):
        inspect_checkpoint(str(tiny_layerwise_path), start_layer=3)


@pytest.mark.parametrize("max_layer", [1, 7])
def test_max_layer_must_leave_an_exit(tiny_layerwise_path, max_layer):
    with pytest.raises(ValueError, match=f"max_layer={max_layer} leaves no exit or no layer"):
        inspect_checkpoint(str(tiny_layerwise_path), max_layer=max_layer)


def test_missing_files_are_named(tiny_layerwise_path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing"):
        MatryoshkaReranker(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"no adapter \(adapter_config.json\) at"):
        MatryoshkaReranker(str(tiny_layerwise_path), peft_path=str(tmp_path))


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model of type 'bert'"):
        MatryoshkaReranker(str(tmp_path))


@pytest.fixture(scope="module")
def adapters(tiny_layerwise_path, tmp_path_factory):
    """Two random adapters on all linear layers and heads, and the scores of the model with both."""
    paths = []
    model = CostWiseMistralForCausalLM.from_pretrained(tiny_layerwise_path, dtype=torch.float32)
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "linear_head"], init_lora_weights=False)
        peft_model = get_peft_model(model, config)
        paths.append(str(tmp_path_factory.mktemp("adapter")))
        peft_model.save_pretrained(paths[-1])
        model = peft_model.merge_and_unload()
    return paths


def test_adapters_are_merged_heads_included_in_order(tiny_layerwise_path, adapters):
    plain = scores(tiny_layerwise_path)
    one, both = scores(tiny_layerwise_path, peft_path=adapters[0]), scores(tiny_layerwise_path, peft_path=adapters)
    assert (one - plain).abs().max() > 1e-3
    assert (both - one).abs().max() > 1e-3
    merged = MatryoshkaReranker(str(tiny_layerwise_path), peft_path=adapters, dtype="float32", devices="cpu")
    torch.testing.assert_close(scores(tiny_layerwise_path, peft_path=tuple(adapters)), both)
    assert type(merged.model) is CostWiseMistralForCausalLM


def test_adapters_on_fewer_layers(tiny_layerwise_path, adapters):
    full = scores(tiny_layerwise_path, peft_path=adapters)
    lower = scores(tiny_layerwise_path, peft_path=adapters, max_layer=4)
    torch.testing.assert_close(lower, full[: len(lower)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", range(9))
def test_golden_scores_of_merged_adapters_from_text(shared_parity, case):
    golden = json.loads((shared_parity / "scores.json").read_text())
    expected = golden["raw_with_adapters"][case]
    reranker = MatryoshkaReranker(
        str(shared_parity / "raw_model"),
        peft_path=[str(shared_parity / "adapters" / name) for name in expected["adapters"]],
        start_layer=2,
        dtype="float32",
        devices="cpu",
        query_max_length=golden["query_max_length"],
        max_length=golden["max_length"],
        compress_layers=expected["compress_layers"],
        compress_ratio=expected["compress_ratio"],
    )
    actual = reranker.compute_score(golden["pairs"], cutoff_layers=golden["layers"])
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected["scores"]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", range(5))
def test_golden_scores_of_a_layer_wise_checkpoint_from_text(shared_parity, case):
    golden = json.loads((shared_parity / "scores.json").read_text())
    expected = golden["layerwise"][case]
    reranker = MatryoshkaReranker(str(shared_parity / "layerwise_model"), dtype="float32", devices="cpu")
    actual = reranker.compute_score(
        golden["pairs"],
        cutoff_layers=golden["layers"],
        compress_layers=expected["compress_layers"],
        compress_ratio=expected["compress_ratio"],
        query_max_length=golden["query_max_length"],
        max_length=golden["max_length"],
    )
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected["scores"]), atol=2e-5, rtol=0)
