"""Float32 products by oneDNN: the same numbers as torch's, and torch's own layers where they do not apply."""

import pytest
import torch
from torch import nn

from flagembedding_matryoshka.models import onednn
from flagembedding_matryoshka.models.onednn import OneDnnLinear, use_onednn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the inputs of oneDNN's products."""
    shapes = []

    def noted(states, *others):
        shapes.append(tuple(states.shape))
        return product(states, *others)

    product = onednn.onednn_linear
    monkeypatch.setattr(onednn, "onednn_linear", noted)
    return shapes


def converted(bias, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=bias, dtype=dtype)
    use_onednn(nn.Sequential(linear))
    assert type(linear) is OneDnnLinear
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (1, 33, 24), (2, 3, 5, 24), (0, 24)])
def test_without_a_gradient_the_product_is_that_of_torch(shape, bias, calls):
    linear, inputs = converted(bias), torch.randn(shape)
    with torch.inference_mode():
        output = linear(inputs)
    torch.testing.assert_close(output, nn.functional.linear(inputs, linear.weight, linear.bias), rtol=1e-5, atol=1e-6)
    assert calls == [shape]


@pytest.mark.parametrize(
    "strided", [torch.randn(24, 7).t(), torch.randn(7, 48)[:, ::2], torch.randn(1, 24).expand(7, 24)]
)
def test_rows_may_have_any_strides(strided):
    linear = converted(True)
    with torch.no_grad():
        torch.testing.assert_close(linear(strided), nn.functional.linear(strided, linear.weight, linear.bias))


def test_with_a_gradient_the_layer_is_that_of_torch(calls):
    linear = converted(True)
    linear(torch.randn(7, 24)).sum().backward()
    assert linear.weight.grad is not None and not calls


def test_in_bfloat16_the_layer_is_that_of_torch(calls):
    with torch.inference_mode():
        assert converted(True, torch.bfloat16)(torch.randn(7, 24).bfloat16()).dtype == torch.bfloat16
    assert not calls
