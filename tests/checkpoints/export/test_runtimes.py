"""An exit in ONNX and in OpenVINO's format has the scores of this package."""

import pytest
import torch
from transformers import AutoTokenizer

from tests.exports import EXITS, SHORT, load, mixed_pairs, write_reranker

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
PAIRS = mixed_pairs()
INPUTS = ("input_ids", "attention_mask")


def onnx_scores(directory, batch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    session = onnxruntime.InferenceSession(directory / "onnx" / "model.onnx")
    return session.run(["logits"], batch)[0][:, 0]


def openvino_scores(directory, batch):
    openvino = pytest.importorskip("openvino", reason="the package openvino is not installed")
    path = directory / "openvino" / "openvino_model.xml"
    model = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return model(batch)["logits"][:, 0]


RUNTIMES = {"onnx": ("onnxscript", onnx_scores), "openvino": ("openvino", openvino_scores)}


@pytest.mark.parametrize("format", RUNTIMES)
@pytest.mark.parametrize("name", ["mistral", "qwen3"])  # with a window, and without
def test_a_runtime_gives_the_scores_of_the_exit(name, format, tmp_path):
    package, scores_of = RUNTIMES[format]
    pytest.importorskip(package, reason=f"the package {package} is not installed")
    reranker = load(write_reranker(name, tmp_path, SHORT))
    reranker.export(str(tmp_path / "out"), list(EXITS), format=format)
    for layer in EXITS:
        directory = tmp_path / "out" / f"exit-{layer}"
        messages = [
            [{"role": "query", "content": query}, {"role": "document", "content": document}]
            for query, document in PAIRS
        ]
        tokenizer = AutoTokenizer.from_pretrained(directory)
        batch = tokenizer.apply_chat_template(messages, padding=True, return_tensors="np", return_dict=True)
        found = scores_of(directory, {name: batch[name] for name in INPUTS})
        expected = torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=layer))
        assert expected.std() > 1e-2
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)
