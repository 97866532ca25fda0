"""Weights in fewer bits."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.models import quantization
from flagembedding_matryoshka.models.quantization import Int8Linear, quantize, rounded
from tests.tiny_base import TINY_BASE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def linears():
    """A linear layer with a bias, and the same one in 8 bits, out of a quantized model."""
    model = MatryoshkaReranker(TINY_BASE, start_layer=3, dtype="float32", devices="cpu").model
    torch.manual_seed(0)
    full = nn.Linear(24, 10)
    small = nn.Linear(24, 10)
    small.load_state_dict(full.state_dict())
    model.model.layers[0].extra = small
    quantize(model, "int8")
    assert type(small) is Int8Linear and small.weight.dtype == torch.int8
    return full, small


def steps(values):
    """One step of the integers of each row."""
    return values.abs().amax(-1, keepdim=True) / 127


@pytest.mark.parametrize("has_vnni", [True, False])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (1, 33, 24), (2, 3, 5, 24), (0, 24)])
def test_int8_is_the_product_of_rounded_rows_and_rounded_channels(shape, has_vnni, linears, monkeypatch):
    monkeypatch.setattr(quantization, "has_vnni", lambda: has_vnni)
    full, small = linears
    states = torch.randn(shape)
    rows, weight = (values.double() for values in (states, full.weight.detach()))
    rows, weight = (torch.round(values / steps(values)) * steps(values) for values in (rows, weight))
    expected = (rows @ weight.t() + full.bias.detach().double()).float()
    with torch.inference_mode():
        torch.testing.assert_close(small(states), expected, rtol=1e-5, atol=1e-5)


def test_each_value_is_rounded_by_at_most_half_a_step_of_its_row():
    rows = torch.randn(50, 24) * 10.0 ** torch.arange(-25, 25)[:, None]
    rows[3] = 0
    integers, step = rounded(rows)
    assert integers.dtype == torch.int8 and integers.abs().amax(-1).tolist() == [127] * 3 + [0] + [127] * 46
    # beyond the half, one value's rounding error in float32
    assert ((integers * step - rows).abs() <= step * 0.5001).all()


def test_rows_in_8_bits_do_not_depend_on_one_another(linears):
    _, small = linears
    states = torch.randn(40, 24)
    with torch.inference_mode():
        alone = torch.cat([small(row) for row in states.split(1)])
        states[7] *= 1e4
        beside = small(states)
    assert torch.equal(beside[:7], alone[:7]) and torch.equal(beside[8:], alone[8:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_finite_in_8_bits(value, linears):
    states = torch.randn(2, 24)
    states[1, 5] = value
    with torch.inference_mode():
        first, second = linears[1](states)
    assert first.isfinite().all() and not second.isfinite().any()


def test_bfloat16_beside_8_bits_scores_nearly_as_float32_does():
    pairs = [("a wing in air", passage) for passage in ("lift of a wing", "a boundary layer", "heat", "of a list")]
    scores = {
        dtype: torch.tensor(
            MatryoshkaReranker(TINY_BASE, start_layer=3, dtype=dtype, devices="cpu", quantization="int8").compute_score(
                pairs
            )
        )
        for dtype in ("float32", "bfloat16")
    }
    difference = (scores["bfloat16"] - scores["float32"]).abs().max()
    assert 0 < difference < 0.1 * scores["float32"].std()


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
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
