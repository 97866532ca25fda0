"""An exit in ONNX and in OpenVINO's format has the scores of this package."""

import pytest
import torch
from scipy.stats import kendalltau
from transformers import AutoTokenizer

from tests.exports import CAPPED, CLASSIFIERS, EXITS, SHORT, load, mixed_pairs, uncapped, write_reranker

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
PAIRS = mixed_pairs()
INPUTS = ("input_ids", "attention_mask")


def onnx_scores(directory, batch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    session = onnxruntime.InferenceSession(directory / "onnx" / "model.onnx")
    return session.run(["logits"], batch)[0][:, 0]


def openvino_scores(directory, batch, hint="f32"):
    openvino = pytest.importorskip("openvino", reason="the package openvino is not installed")
    path = directory / "openvino" / "openvino_model.xml"
    model = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return model(batch)["logits"][:, 0]


RUNTIMES = {"onnx": ("onnxscript", onnx_scores), "openvino": ("openvino", openvino_scores)}


def batch_of(directory, pairs=PAIRS):
    messages = [
        [{"role": "query", "content": query}, {"role": "document", "content": document}] for query, document in pairs
    ]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer.apply_chat_template(messages, padding=True, return_tensors="np", return_dict=True)
    return {name: batch[name] for name in INPUTS}


DEEP = ("mistral", "qwen3")
"""Backbones whose second exit goes to ONNX, too. torch.export takes 3 to 4 seconds a layer, so that the other backbones
have one exit there, and two in OpenVINO. The layers of both exits are of the same kinds, see `VALUES`."""
CASES = {
    f"{format}-{name}": (format, name, EXITS if format == "openvino" or name in DEEP else EXITS[:1])
    for format in RUNTIMES
    for name in CLASSIFIERS
}
VALUES = {"qwen2": {"max_window_layers": 1}}
"""Changes to a tiny backbone, so that its first three layers have all kinds: with a window, and without."""


@pytest.mark.parametrize(("format", "name", "exits"), CASES.values(), ids=CASES)
def test_a_runtime_gives_the_scores_of_the_exits(format, name, exits, tmp_path):
    package, scores_of = RUNTIMES[format]
    pytest.importorskip(package, reason=f"the package {package} is not installed")
    reranker = load(write_reranker(name, tmp_path, SHORT, **VALUES.get(name, {})))
    for layer in exits:
        directory = tmp_path / str(layer)
        reranker.export(str(directory), layer, format=format, allow_uncapped=name in CAPPED)
        found = torch.tensor(scores_of(directory, batch_of(directory)))
        expected = uncapped(name, reranker.compute_score(PAIRS, cutoff_layers=layer))
        assert expected.std() > 1e-2
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_bfloat16_matrices_have_half_the_size_and_the_scores_of_rounded_weights(tmp_path):
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    reranker = load(write_reranker("mistral", tmp_path, SHORT))
    reranker.export(str(tmp_path / "out"), 3, format="openvino", precision="bf16")
    for parameter in reranker.model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.bfloat16().float()
    found = openvino_scores(tmp_path / "out", batch_of(tmp_path / "out"))
    expected = torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=3))
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)
    size = (tmp_path / "out" / "openvino" / "openvino_model.bin").stat().st_size
    layers = [f"layers.{layer}." for layer in range(3)]
    matrices = [
        parameter.numel()
        for name, parameter in reranker.model.named_parameters()
        if parameter.dim() == 2 and ("embed_tokens" in name or any(layer in name for layer in layers))
    ]
    assert 2 * sum(matrices) < size < 2.5 * sum(matrices)


def test_int8_measures_ranges_on_the_given_pairs(tmp_path):
    pytest.importorskip("nncf", reason="the package nncf is not installed")
    openvino = pytest.importorskip("openvino", reason="the package openvino is not installed")
    reranker = load(write_reranker("mistral", tmp_path, SHORT))
    expected = reranker.compute_score(PAIRS, cutoff_layers=3)
    found = {}
    for name, sample in (("given", PAIRS[:9]), ("built-in", None)):
        reranker.export(str(tmp_path / name), 3, format="openvino", precision="int8", sample=sample)
        graph = openvino.Core().read_model(tmp_path / name / "openvino" / "openvino_model.xml")
        assert sum(operation.get_type_name() == "FakeQuantize" for operation in graph.get_ops()) > 3
        assert any(operation.get_element_type() == openvino.Type.i8 for operation in graph.get_ops())
        found[name] = openvino_scores(tmp_path / name, batch_of(tmp_path / name))
        assert kendalltau(found[name], expected).statistic > 0.8
    assert (found["given"] != found["built-in"]).any()
