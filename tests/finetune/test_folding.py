"""Adapters that are folded into the weight: the same outputs and gradients as peft's layers."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from flagembedding_matryoshka.finetune import trainer
from flagembedding_matryoshka.finetune.folding import FoldedLinear, FoldedProduct, fold_adapters
from tests.finetune.runs import close, runner


class Two(nn.Module):
    """Two linear layers. The second one may have a bias."""

    def __init__(self, has_bias: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10, bias=False), nn.Linear(10, 3, bias=has_bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(states)))


def adapted(has_bias: bool = False, dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["first", "second"], "init_lora_weights": False, **options}
    return get_peft_model(Two(has_bias).to(dtype), LoraConfig(**options))


def gradients(model: PeftModel, states: torch.Tensor) -> dict[str, torch.Tensor]:
    states = states.clone().requires_grad_()
    output = model(states)
    output.square().sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"output": output.detach(), "states": states.grad, **found}


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_outputs_and_gradients_are_those_of_peft(shape):
    plain, folded = adapted(), adapted()
    assert fold_adapters(folded) == 2
    states = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected, found = gradients(plain, states), gradients(folded, states)
    assert expected.keys() == found.keys()
    assert len(found) == 6  # output, states, and A and B of both layers
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(2)
    shapes = (4, 3), (5, 3), (2, 3), (5, 2)
    states, weight, a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    learnt = states.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda states, a, b: FoldedProduct.apply(states, weight, a, b, 0.5), learnt)


def test_under_autocast_the_sum_is_the_merged_weight():
    model = adapted(dtype=torch.bfloat16)
    merged = adapted(dtype=torch.bfloat16)
    fold_adapters(model)
    states = torch.randn(7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output = model.base_model.model.first(states)
    layer = merged.base_model.model.first
    layer.merge()
    torch.testing.assert_close(output, layer.base_layer(states.bfloat16()), rtol=1e-2, atol=1e-2)
    output.float().sum().backward()
    trained = model.base_model.model.first
    assert {weight.grad.dtype for weight in trained.parameters() if weight.requires_grad} == {torch.float32}


def test_switched_off_a_layer_is_its_base():
    model = adapted()
    fold_adapters(model)
    states = torch.randn(3, 6)
    two = model.base_model.model
    with model.disable_adapter():
        expected = two.second.base_layer(torch.tanh(two.first.base_layer(states)))
        torch.testing.assert_close(model(states), expected)
    assert not torch.allclose(model(states), expected)


@pytest.mark.parametrize(
    ("options", "folded"),
    [
        ({}, 2),
        ({"lora_dropout": 0.1}, 0),
        ({"use_dora": True}, 0),
        ({"has_bias": True}, 1),
        ({"has_bias": True, "lora_bias": True, "target_modules": ["second"]}, 0),
    ],
)
def test_what_cannot_be_folded_stays(options, folded):
    model = adapted(**options)
    assert fold_adapters(model) == folded
    assert sum(isinstance(module, FoldedLinear) for module in model.modules()) == folded


def test_a_base_that_learns_stays():
    model = adapted()
    for weight in model.parameters():
        weight.requires_grad_()
    assert fold_adapters(model) == 0


def test_a_run_with_folded_adapters_learns_the_same(tiny_raw_model_path, training_file, tmp_path, monkeypatch):
    folded = runner(tiny_raw_model_path, training_file, tmp_path / "folded")
    folded.run()
    assert sum(isinstance(module, FoldedLinear) for module in folded.model.modules()) > 0
    monkeypatch.setattr(trainer, "fold_adapters", lambda model: 0)
    plain = runner(tiny_raw_model_path, training_file, tmp_path / "plain")
    plain.run()
    assert not any(isinstance(module, FoldedLinear) for module in plain.model.modules())
    trained = {name: weight for name, weight in plain.model.named_parameters() if weight.requires_grad}
    for name, weight in folded.model.named_parameters():
        if weight.requires_grad:
            close(weight, trained[name])
