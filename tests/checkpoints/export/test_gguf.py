"""An exit as a GGUF file that llama.cpp ranks with."""

import pytest
import torch
from scipy.stats import kendalltau

from tests.exports import EXITS, SHORT, load, mixed_pairs, write_reranker

pytestmark = pytest.mark.usefixtures("one_thread")
gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
PAIRS = [(query, document) for query, document in mixed_pairs() if document]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return write_reranker("qwen3", tmp_path_factory.mktemp("qwen3"), "qwen3-reranker")


def logits(path):
    """What llama.cpp ranks pairs with, before the softmax."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    params.n_ctx = params.n_batch = params.n_ubatch = 1024
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = 0
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    found = []
    for query, document in PAIRS:
        answer = server.handle_rerank({"query": query, "documents": [document]})
        found.append(answer["results"][0]["relevance_score"])
    return torch.logit(torch.tensor(found, dtype=torch.float64))


def agreement(found, expected):
    """Kendall's tau over scores that are further apart than a tenth of their standard deviation.

    q8_0 rounds weights and activations. With a long template, it moves scores of random models with rows of 32 to 128
    values by .04 to .07 of their standard deviation, whatever the width. Scores that lie closer come in any order: over
    all, tau is .95 to .97, and over these at least .986.
    """
    distances, ours = found[:, None] - found, expected[:, None] - expected
    apart = ours.abs() > 0.1 * expected.std()
    return (distances[apart].sign() * ours[apart].sign()).mean()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["f32", "f16", "q8_0"])
def test_llama_cpp_gives_the_scores_of_the_exit(precision, qwen3, tmp_path):
    reranker = load(qwen3)
    reranker.export(str(tmp_path), list(EXITS), format="gguf", precision=precision)
    for layer in EXITS:
        found = logits(tmp_path / f"exit-{layer}" / f"model-{precision}.gguf")
        expected = torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=layer), dtype=torch.float64)
        if precision == "f32":
            assert (found - expected).abs().max() < 1e-3
        assert agreement(found, expected) > 0.98
        assert kendalltau(found, expected).statistic > (0.95 if precision == "q8_0" else 0.98)


@pytest.mark.slow
def test_q8_0_keeps_the_order_of_all_pairs_where_texts_matter(tmp_path):
    """q8_0 rounds relative to the whole hidden state, and scores differ by what the texts add to it.

    In the random model above, the last token's embedding and the long template, which are the same for all pairs, make
    up most of the state. Here the template is short and values of attention are three times as large. The rounding is
    then .02 to .03 of the scores' standard deviation, not .05 to .07.
    """
    reranker = load(write_reranker("qwen3", tmp_path, SHORT))
    with torch.no_grad():
        for layer in reranker.model.model.layers:
            layer.self_attn.v_proj.weight *= 3
    reranker.export(str(tmp_path / "out"), list(EXITS), format="gguf", precision="q8_0")
    for layer in EXITS:
        found = logits(tmp_path / "out" / f"exit-{layer}" / "model-q8_0.gguf")
        expected = reranker.compute_score(PAIRS, cutoff_layers=layer)
        assert kendalltau(found, expected).statistic >= 0.98


def test_the_head_has_a_second_row_of_zeros(qwen3, tmp_path):
    load(qwen3).export(str(tmp_path), 3, format="gguf")
    header = gguf.GGUFReader(tmp_path / "model-f32.gguf")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    assert tensors["cls.output.weight"].data.shape == (2, 32) and not tensors["cls.output.weight"].data[1].any()
    assert "blk.2.ffn_down.weight" in tensors and "blk.3.ffn_down.weight" not in tensors
    values = {name: field.contents() for name, field in header.fields.items()}
    assert values["qwen3.pooling_type"] == 4 and values["qwen3.block_count"] == 3
    assert "{query}" in values["tokenizer.chat_template.rerank"]
    card = (tmp_path / "README.md").read_text()
    assert "llama-server --model DIR/model-f32.gguf --reranking" in card


@pytest.mark.parametrize(
    ("name", "template", "message"),
    [
        ("llama", "qwen3-reranker", r"cls.output.weight\) with architecture 'qwen3' alone, but .* is a 'llama'"),
        ("qwen3", "cost_wise", "joins texts with the words around them, and llama.cpp cannot split there"),
        ("qwen3", "zerank", r"llama.cpp does not strip texts, but the template .* strips \('query', 'passage'\)"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(name, template, message, tmp_path):
    reranker = load(write_reranker(name, tmp_path, template))
    with pytest.raises(ValueError, match=message):
        reranker.export(str(tmp_path / "out"), 3, format="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_bias": True}, "no place for {'attention_bias': True}"),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "{'sliding_window': 9}"),
    ],
)
def test_other_attention_is_refused(values, message, tmp_path):
    reranker = load(write_reranker("qwen3", tmp_path, "qwen3-reranker", **values))
    with pytest.raises(ValueError, match=message):
        reranker.export(str(tmp_path / "out"), 3, format="gguf")


def test_another_split_is_refused(tiny_tokenizer, tmp_path):
    reranker = load(write_reranker("qwen3", tmp_path, "question-passage", tiny_tokenizer))
    with pytest.raises(ValueError, match="only Qwen's are written here"):
        reranker.export(str(tmp_path / "out"), 3, format="gguf")
