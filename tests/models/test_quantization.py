from importlib.util import find_spec

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from tests.tiny_base import TINY_BASE

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]


def test_gradients_pass_through_weights_that_have_scored():
    model = MatryoshkaReranker(TINY_BASE, start_layer=3, dtype="float32", devices="cpu", quantization="nf4").model
    tokens = torch.randint(10, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for _ in range(2):
        states = model.train().get_input_embeddings()(tokens).detach().requires_grad_()
        weights = model.model.layers[0].self_attn.q_proj
        assert weights.weight.dtype == torch.uint8
        gradients.append(torch.autograd.grad(weights(states).square().sum(), states)[0])
        with torch.inference_mode():
            model.eval()(tokens)
    assert gradients[0].any() and torch.equal(*gradients)
