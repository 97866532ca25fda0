"""LoRA layers that add the adapter to the weight once a pass, instead of to the output of every token."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from flagembedding_matryoshka.models.onednn import OneDnnLinear, product


class FoldedProduct(Function):
    """x (W + s·B·A)ᵀ, and its gradients for x, A and B without that of the sum, (out, in).

    A pass over many tokens computes fewer and larger products than x Wᵀ + s·(x Aᵀ) Bᵀ does: the sum costs as much as
    `rank` tokens. The backward pass computes it again, so that it takes no memory. In bfloat16 the sum is rounded as it
    is when an adapter is merged, so that training sees the weights that scoring uses.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return (..., out), in the dtype of autocast or else of the weight.

        Args:
            states: (..., in).
            weight: (out, in), without a gradient.
            a, b: (rank, in) and (out, rank).
            scale: factor of the adapter.
        """
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        rows = states.reshape(-1, states.shape[-1]).to(dtype)
        ctx.save_for_backward(rows, weight, a, b)
        ctx.scale, ctx.shape, ctx.dtype = scale, states.shape, states.dtype
        return product(rows, _folded(weight, a, b, scale, dtype)).view(*states.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of states, A and B."""
        rows, weight, a, b = ctx.saved_tensors
        gradient = outputs[0].reshape(-1, outputs[0].shape[-1]).to(rows.dtype)
        of_states = None
        if ctx.needs_input_grad[0]:
            of_rows = product(gradient, _folded(weight, a, b, ctx.scale, rows.dtype).t())
            of_states = of_rows.view(ctx.shape).to(ctx.dtype)
        of_a = gradient.mm(b.to(rows.dtype)).t().mm(rows).to(a.dtype) * ctx.scale
        of_b = gradient.t().mm(rows.mm(a.to(rows.dtype).t())).to(b.dtype) * ctx.scale
        return of_states, None, of_a, of_b, None


def _folded(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return W + s·B·A, (out, in)."""
    return torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=scale)


class FoldedLinear(LoraLinear):
    """A linear layer with one LoRA adapter, that runs as a `FoldedProduct`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, (..., out). Without its adapter the layer runs as peft's."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        weight, a, b = self.base_layer.weight, self.lora_A[name].weight, self.lora_B[name].weight
        output: Tensor = FoldedProduct.apply(x, weight, a, b, self.scaling[name])
        return output


def fold_adapters(model: PeftModel) -> int:
    """Turn LoRA layers into `FoldedLinear`, and return their number.

    A layer stays as it is if its adapter has a dropout, a bias or a variant such as DoRA, or its base has a bias, is
    quantised or has a gradient.
    """
    count = 0
    for module in model.modules():
        if type(module) is LoraLinear and _can_fold(module):
            module.__class__ = FoldedLinear
            count += 1
    return count


def _can_fold(layer: LoraLinear) -> bool:
    base, names = layer.base_layer, layer.active_adapters
    return (
        type(base) in (nn.Linear, OneDnnLinear)
        and base.bias is None
        and not base.weight.requires_grad
        and len(names) == 1
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and layer.lora_B[names[0]].bias is None
        and names[0] not in layer.lora_variant
    )
