import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from flagembedding_matryoshka import CostWiseMistralForCausalLM, MatryoshkaReranker
from flagembedding_matryoshka.inference.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("what about the wing", "this text is about a wing, a flow and a body"), ("what about the flow", "air " * 30)]


@pytest.fixture(scope="module")
def adapters(tiny_layerwise_path, tiny_tokenizer, tmp_path_factory):
    """Paths of adapters that change scores: "stage1" and "layer" for every width, 2 and 4 for their ratio alone."""
    paths = {}
    for seed, name in enumerate(("stage1", "layer", 2, 4)):
        torch.manual_seed(seed)
        model = CostWiseMistralForCausalLM.from_pretrained(tiny_layerwise_path, dtype=torch.float32)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "linear_head"], init_lora_weights=False)
        paths[name] = str(tmp_path_factory.mktemp(f"adapter_{name}"))
        if name != "stage1":
            axis = "layer" if name == "layer" else "token"
            model.config.compensation = {"axis": axis, "compress_ratio": 1 if name == "layer" else name}
        settings = copy.deepcopy(model.config)
        get_peft_model(model, config).save_pretrained(paths[name])
        settings.save_pretrained(paths[name])
        tiny_tokenizer.save_pretrained(paths[name])
    return paths


def scores(reranker, ratio):
    width = {"compress_layers": [2], "compress_ratio": ratio}
    return torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=[2, 4, 6], **width))


def load(path, peft_path):
    return MatryoshkaReranker(str(path), peft_path=peft_path, dtype="float32", devices="cpu")


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path, adapters):
    return load(tiny_layerwise_path, list(adapters.values()))


@pytest.fixture(scope="module")
def merged(tiny_layerwise_path, adapters):
    """For each ratio a model into which the adapters that act at it, and no others, have been merged."""
    rerankers = {}
    for ratio in (1, 2, 4, 8):
        own = load(tiny_layerwise_path, [adapters["stage1"], adapters["layer"]])
        if ratio in adapters:
            own.model = PeftModel.from_pretrained(own.model, adapters[ratio]).merge_and_unload().eval()
            own._engine = Engine(own.model)
        rerankers[ratio] = own
    return rerankers


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_a_ratio_uses_its_adapter_or_none(ratio, reranker, merged):
    torch.testing.assert_close(scores(reranker, ratio), scores(merged[ratio], ratio), atol=1e-5, rtol=0)
    if ratio in (2, 4):
        assert (scores(reranker, ratio) - scores(merged[1], ratio)).abs().max() > 1e-3


def test_switching_back_gives_the_same_bits(reranker):
    before = {ratio: scores(reranker, ratio) for ratio in (1, 2, 4, 8)}
    for ratio in (4, 2, 8, 1, 2):
        assert torch.equal(scores(reranker, ratio), before[ratio])


def test_threads_with_different_ratios_do_not_disturb_each_other(reranker):
    before = {ratio: scores(reranker, ratio) for ratio in (1, 2, 4)}
    ratios = [1, 2, 4] * 8
    with ThreadPoolExecutor(4) as pool:
        for ratio, found in zip(ratios, pool.map(lambda ratio: scores(reranker, ratio), ratios), strict=True):
            assert torch.equal(found, before[ratio])


def test_an_adapter_directory_is_a_model_of_its_ratio(tiny_layerwise_path, adapters, merged):
    alone = MatryoshkaReranker(adapters[2], peft_path=[adapters["stage1"]], dtype="float32", devices="cpu")
    plain = load(tiny_layerwise_path, adapters["stage1"])
    torch.testing.assert_close(scores(alone, 1), scores(plain, 1), atol=1e-5, rtol=0)
    assert (scores(alone, 2) - scores(plain, 2)).abs().max() > 1e-3


def test_what_has_token_adapters_is_not_exported(reranker, tmp_path):
    with pytest.raises(ValueError, match=r"token adapters for the ratios \[2, 4\] are attached"):
        reranker.export(str(tmp_path), [4])


def test_two_adapters_for_one_ratio_are_refused(tiny_layerwise_path, adapters):
    with pytest.raises(ValueError, match=r"are both token adapters for compress_ratio=2"):
        load(tiny_layerwise_path, [adapters[2], adapters[2]])


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("layers", [[2], [4]])
def test_stored_passages_ran_with_the_adapter_of_their_ratio(reranker, merged, ratio, layers, tmp_path):
    texts = {str(place): text for place, (_, text) in enumerate(PAIRS)}
    width = {"compress_layers": layers, "compress_ratio": ratio}
    store = reranker.store(texts, tmp_path / "store", store_layer=2, **width)
    stored = {hit["corpus_id"]: hit["score"] for hit in reranker.rank("a wing", ids=list(texts), store=store, **width)}
    expected = merged[ratio].compute_score([("a wing", text) for text in texts.values()], store_layer=2, **width)
    torch.testing.assert_close(torch.tensor([stored[0], stored[1]]), torch.tensor(expected), atol=1e-5, rtol=0)
    other = {1: 4, 2: 4, 4: 2, 8: 2}[ratio]
    with pytest.raises(ValueError, match=rf"token_adapter={ratio if ratio in (2, 4) else None}, and not {other}"):
        reranker.rank("a wing", ids=list(texts), store=store, compress_layers=layers, compress_ratio=other)
