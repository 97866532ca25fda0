import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralForCausalLM

from flagembedding_matryoshka import CostWiseMistralForCausalLM, MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint, load_model
from flagembedding_matryoshka.cross_encoder import load_cross_encoder
from flagembedding_matryoshka.text.pairs import find_head_token_id
from tests.backbones import write_raw
from tests.batches import random_sequences

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
    # the default of raw checkpoints is a contradiction, too, when somebody asks for it
    for layer in (3, 4):
        with pytest.raises(ValueError, match=rf"start_layer={layer}, but the heads of .* trained with start_layer=2"):
            inspect_checkpoint(str(tiny_layerwise_path), start_layer=layer)
    assert inspect_checkpoint(str(tiny_layerwise_path), start_layer=2, layer_sep=1).config.exit_layers[0] == 2


@pytest.mark.parametrize("max_layer", [1, 7])
def test_max_layer_must_leave_an_exit(tiny_layerwise_path, max_layer):
    with pytest.raises(ValueError, match=f"max_layer={max_layer} leaves no exit or no layer"):
        inspect_checkpoint(str(tiny_layerwise_path), max_layer=max_layer)


def test_missing_files_are_named(tiny_layerwise_path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing"):
        MatryoshkaReranker(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"no adapter \(adapter_config.json\) at"):
        MatryoshkaReranker(str(tiny_layerwise_path), peft_path=str(tmp_path))


class Trap:
    """An object whose pickle makes a directory when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickled(path, copy, extra=None):
    """A copy of a checkpoint or an adapter whose weights are pickled."""
    shutil.copytree(path, copy)
    (safe,) = copy.glob("*model.safetensors")
    name = {"model": "pytorch_model", "adapter_model": "adapter_model"}[safe.stem]
    torch.save(load_file(safe) | (extra or {}), copy / f"{name}.bin")
    safe.unlink()
    return copy


@pytest.mark.parametrize("base", ["tiny_raw_model_path", "tiny_layerwise_path"])
def test_pickled_weights_are_read_only_if_the_caller_allows_it(base, request, tmp_path):
    expected = scores(request.getfixturevalue(base))
    path = pickled(request.getfixturevalue(base), tmp_path / "model")
    message = (
        rf"the weights of {path} are pickled \(pytorch_model.bin\), and a pickle can run code .* give "
        r"allow_pickle=True \(--allow_pickle\)\. Otherwise ask for model.safetensors\."
    )
    with pytest.raises(ValueError, match=message):
        scores(path)
    with pytest.raises(ValueError, match=message):
        load_cross_encoder(path, device="cpu")
    config = inspect_checkpoint(path).config
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        CostWiseMistralForCausalLM.from_pretrained(path, config=config)
    torch.testing.assert_close(scores(path, allow_pickle=True), expected, atol=0, rtol=0)
    model = load_cross_encoder(path, device="cpu", model_kwargs={"use_safetensors": False})
    torch.testing.assert_close(torch.tensor(model.predict(PAIRS)), expected[-1], atol=1e-5, rtol=0)


def test_pickled_adapters_are_read_only_if_the_caller_allows_it(tiny_layerwise_path, adapters, tmp_path):
    expected = scores(tiny_layerwise_path, peft_path=adapters[0])
    path = pickled(Path(adapters[0]), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"pickled \(adapter_model.bin\), .* for adapter_model.safetensors"):
        scores(tiny_layerwise_path, peft_path=path)
    found = scores(tiny_layerwise_path, peft_path=path, allow_pickle=True)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_safetensors_come_first_and_shards_are_refused_too(tiny_layerwise_path, tmp_path):
    both = shutil.copytree(tiny_layerwise_path, tmp_path / "both")
    (both / "pytorch_model.bin").write_text("not read")
    assert torch.equal(scores(both), scores(tiny_layerwise_path))
    (both / "model.safetensors").unlink()
    (both / "pytorch_model.bin").rename(both / "pytorch_model.bin.index.json")
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model.bin.index.json\)"):
        scores(both)


def test_code_in_a_pickle_does_not_run_even_if_it_is_allowed(tiny_layerwise_path, tmp_path):
    path = pickled(tiny_layerwise_path, tmp_path / "model", {"trap": Trap(str(tmp_path / "sprung"))})
    torch.load(path / "pytorch_model.bin", weights_only=False)
    (tmp_path / "sprung").rmdir()  # the trap works
    for options in ({}, {"allow_pickle": True}):
        with pytest.raises((ValueError, pickle.UnpicklingError), match=r"pickle|weights_only"):
            scores(path, **options)
    assert not (tmp_path / "sprung").exists()


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        ValueError, match=r"model of type 'bert'\..* A re-ranker is made or loaded .* cost_wise_mistral,"
    ):
        MatryoshkaReranker(str(tmp_path))


def test_a_path_may_be_a_path_or_begin_at_home(tiny_layerwise_path, adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_layerwise_path)
    (tmp_path / "adapter").symlink_to(adapters[0])
    expected = scores(tiny_layerwise_path, peft_path=adapters[0])
    for path, adapter in (("~/model", "~/adapter"), (tmp_path / "model", Path("~/adapter"))):
        reranker = MatryoshkaReranker(path, peft_path=adapter, dtype="float32", devices="cpu")
        found = reranker.compute_score(PAIRS, cutoff_layers=reranker.config.exit_layers)
        torch.testing.assert_close(torch.tensor(found), expected, atol=0, rtol=0)


def offline(host, *_, **__):
    raise AssertionError(f"asks {host}")


@pytest.mark.parametrize("path", ["./nothing", "~/nothing", "/nothing", "runs/first/nothing", Path("nothing")])
def test_what_can_only_be_a_path_is_not_sent_to_the_hub(path, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", offline)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*nothing"):
        MatryoshkaReranker(path)


def test_what_may_be_a_name_on_the_hub_says_where_it_was_looked_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"there is no checkpoint at runs/nothing: neither a file or directory here .* from the hub"
    with pytest.raises(FileNotFoundError, match=message):
        MatryoshkaReranker("runs/nothing")


def test_a_base_that_has_moved_is_named_with_the_way_out(tiny_layerwise_path, adapters, tmp_path):
    adapter = shutil.copytree(adapters[0], tmp_path / "adapter")
    note = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(note | {"base_model_name_or_path": str(tmp_path / "base")}))
    (tmp_path / "base").symlink_to(tiny_layerwise_path)
    shutil.copy(tiny_layerwise_path / "config.json", adapter)
    assert len(scores(adapter)) == 5
    (tmp_path / "base").unlink()
    message = r"the adapter .*adapter was trained on .*base, which is not there\. .*peft_path='.*adapter'"
    with pytest.raises(FileNotFoundError, match=message):
        scores(adapter)


def test_a_base_is_noted_from_everywhere(tiny_layerwise_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tiny_layerwise_path.parent)
    model = load_model(inspect_checkpoint(tiny_layerwise_path.name), tiny_tokenizer, torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert adapted.peft_config["default"].base_model_name_or_path == str(tiny_layerwise_path)


def test_a_tokenizer_of_another_model_is_refused(tiny_layerwise_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})  # no text becomes this one
    load_model(inspect_checkpoint(str(tiny_layerwise_path)), tokenizer, torch.float32)
    tokenizer.add_tokens(["wings"])
    size = len(tiny_tokenizer)
    message = rf"the tokenizer has {size + 2} tokens, but .* has embeddings of {size}: 1 tokens that texts become"
    with pytest.raises(ValueError, match=message):
        load_model(inspect_checkpoint(str(tiny_layerwise_path)), tokenizer, torch.float32)


def test_weights_that_would_be_left_out_are_refused(tiny_raw_model_path, tmp_path):
    shutil.copytree(tiny_raw_model_path, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"score.weight": torch.ones(1, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"CostWiseMistralForCausalLM has no place for: \['score.weight'\]"):
        MatryoshkaReranker(tmp_path, dtype="float32", devices="cpu")


def test_a_quantised_checkpoint_loads(tiny_tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes packs weights for a CPU in blocks of 64
    raw = write_raw("llama", tiny_tokenizer, tmp_path / "raw", hidden_size=64, intermediate_size=128)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    small = AutoModelForCausalLM.from_pretrained(raw, quantization_config=config, dtype=torch.float32)
    small.save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    reranker = MatryoshkaReranker(tmp_path / "small", dtype="float32", devices="cpu", start_layer=2)
    ids = torch.tensor([random_sequences([(0, 12, 0)])[0].ids])
    with torch.no_grad():
        expected = plain(ids).logits[0, -1, find_head_token_id(tiny_tokenizer)]
        (score,) = reranker.model(ids).logits
    torch.testing.assert_close(score[0], expected, atol=1e-3, rtol=0)


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


def test_a_directory_without_a_configuration_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*: the directory has no config\.json"):
        inspect_checkpoint(tmp_path)
