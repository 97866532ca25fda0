"""The order of copies and kernels, checked without a GPU: on torch's meta device, which computes nothing."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference import engine
from flagembedding_matryoshka.inference.engine import Engine
from flagembedding_matryoshka.models.packing import pack_pairs
from flagembedding_matryoshka.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("a wing", f"passage {number} " * number) for number in range(8)]


class Recorder(TorchDispatchMode):
    """Notes copies from the host to the meta device, and what waits for a device."""

    def __init__(self):
        super().__init__()
        self.copies, self.waits = [], []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        is_meta = any(isinstance(value, torch.Tensor) and value.is_meta for value in arguments)
        name = function.overloadpacket.__name__
        if name == "_to_copy" and not is_meta and torch.device(options.get("device") or "cpu").type == "meta":
            self.copies.append(bool(options.get("non_blocking")))
        if is_meta and name in ("_local_scalar_dense", "nonzero"):
            self.waits.append(name)
        return function(*arguments, **options)


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")


@pytest.mark.parametrize("setting", [Setting(6), Setting((2, 4, 6)), Setting(6, (2, 4), 2)])
def test_no_copy_to_a_device_and_no_kernel_waits(reranker, setting):
    model = copy.deepcopy(reranker.model).to("meta")
    inputs = reranker.tokenize(PAIRS)
    with Recorder() as recorder, torch.no_grad():
        scores = model.scores(model.model.embed(*pack_pairs(inputs, torch.device("meta"))), setting)
    assert scores.shape == (len(setting.cutoff_layers), len(PAIRS)) and scores.is_meta
    assert recorder.copies and all(recorder.copies)
    assert not recorder.waits


def test_a_batchs_scores_are_copied_before_the_next_batch_is_started(reranker, monkeypatch):
    expected = reranker.compute_score(PAIRS, batch_size=2)
    order = []
    forward = Engine._forward

    def copied(values):
        order.append("copy")
        return lambda: order.append("wait") or values

    monkeypatch.setattr(Engine, "_forward", lambda *given: order.append("run") or forward(*given))
    monkeypatch.setattr(engine, "copy_to_host", copied)
    monkeypatch.setattr(reranker._engine, "_ahead", 1)
    assert reranker.compute_score(PAIRS, batch_size=2) == expected
    assert order == ["run", "copy", *["run", "copy", "wait"] * 3, "wait"]
