"""Linear layers and feed-forward blocks that compute by oneDNN on a CPU with AVX-512."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers.activations import SiLUActivation
from transformers.models.mistral.modeling_mistral import MistralMLP

from flagembedding_matryoshka.private import onednn_linear, onednn_order, version_of

MOST_PACKED_BYTES = 2**30
"""Weights of a model that are stored a second time, in oneDNN's order, are at most this large together."""
KEPT_PRODUCTS = 32
"""Products whose code oneDNN keeps. A layer has about seven, and a compressed batch has a few numbers of rows."""
DTYPES = (torch.float32, torch.bfloat16)
HAS_ONEDNN = onednn_linear is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"


class OneDnnProduct(Function):
    """Float32 product of rows and a weight, and its gradients, (rows, out), (out, in) and (out,)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return rows Wᵀ + bias, (rows, out)."""
        ctx.save_for_backward(rows, weight)
        return onednn_linear(rows, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows, weight and bias that are asked for."""
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.t()) if of_rows else None,
            product(gradient.t(), rows.t()) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows Wᵀ, (rows, out), of (rows, in) and (out, in), without a gradient. Both may be transposed."""
    if HAS_ONEDNN and rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32:
        return onednn_linear(rows, weight, None, "none", [], "")
    return torch.mm(rows, weight.t())


class OneDnnLinear(nn.Linear):
    """A linear layer whose products on a CPU are oneDNN's.

    torch computes float32 products by MKL, which uses no AVX-512 on a processor that is not Intel's. On two cores of an
    AMD EPYC oneDNN computes 2,048 rows times a matrix of 576 × 1,536 at 454 GFLOP/s instead of 212, and with the weight
    in its own order at 498. In bfloat16 torch takes oneDNN itself (790 GFLOP/s), and the order counts alone (945), so
    that gradients are left to torch.

    Attributes:
        packs: store the weight in oneDNN's order, too, once it is used.
    """

    packs = False
    # The weight in oneDNN's order, and its source with its version. The source's memory is not used again meanwhile.
    _packed: tuple[Tensor, Tensor, int] | None = None

    def forward(self, input: Tensor, then: str = "none", factor: Tensor | None = None) -> Tensor:
        """Return input Wᵀ + bias, (..., out_features), with `then="swish"` its SiLU, or its product with a factor.

        Without gradients, the weight is read in oneDNN's order if it is stored so. A weight that has changed is stored
        anew.

        Args:
            input: (..., in_features).
            then: "none" or "swish".
            factor: (..., out_features); None is no factor.
        """
        weight: Tensor = self.weight
        learns = torch.is_grad_enabled()
        suits_onednn = (
            input.device.type == "cpu"
            and input.dtype in ((torch.float32,) if learns else DTYPES)
            and input.dtype == weight.dtype
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()  # inductor has products of its own
        )
        if suits_onednn and not learns:
            if self.packs:
                packed = self._packed
                if packed is None or (packed[1].data_ptr(), packed[2]) != (weight.data_ptr(), version_of(weight)):
                    source = weight.detach()
                    self._packed = packed = onednn_order(source, None), source, version_of(weight)
                weight = packed[0]
            if factor is None:
                return onednn_linear(input, weight, self.bias, then, [], "")
            return onednn_linear.binary(input, factor, weight, self.bias, "mul")
        if suits_onednn:
            rows: Tensor = OneDnnProduct.apply(input.reshape(-1, input.shape[-1]), weight, self.bias)
            output = rows.view(*input.shape[:-1], -1)
        else:
            output = super().forward(input)
        output = functional.silu(output) if then == "swish" else output
        return output if factor is None else output * factor

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the weight in oneDNN's order, which cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class OneDnnMlp(nn.Module):
    """Mistral's feed-forward block with SiLU and the gate's product inside oneDNN's products."""

    gate_proj: OneDnnLinear
    up_proj: OneDnnLinear
    down_proj: OneDnnLinear
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) to (..., hidden)."""
        if type(self.gate_proj) is type(self.up_proj) is type(self.down_proj) is OneDnnLinear:
            return self.down_proj(self.up_proj(x, factor=self.gate_proj(x, then="swish")))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # an adapter has replaced a layer


def keep_few_products() -> None:
    """Let oneDNN keep the code of `KEPT_PRODUCTS` products in this process, and torch's layer around it as many.

    Each keeps 1,024 by default. Every number of rows needs its own, so that batches of all sizes took 700 MB. Variables
    of the environment that are set stay. After the first product of oneDNN nothing changes: it has read them.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_PRODUCTS))


def use_onednn(module: nn.Module, packs: bool = True) -> None:
    """Turn linear layers and feed-forward blocks of a module into those of this file, in place.

    Nothing changes if this build of torch has no oneDNN, or the processor no AVX-512. torch then keeps its products.
    Either way few products are kept, see `keep_few_products`.

    Args:
        packs: store weights in oneDNN's order, too. They must not change often.
    """
    keep_few_products()
    if not HAS_ONEDNN:
        return
    linears = [part for part in module.modules() if type(part) is nn.Linear]
    packs = packs and sum(part.weight.nbytes for part in linears) <= MOST_PACKED_BYTES
    for part in linears:
        part.__class__ = OneDnnLinear
        part.packs = packs  # type: ignore[assignment]
    for block in module.modules():
        if _is_gated_by_silu(block):
            block.__class__ = OneDnnMlp


def _is_gated_by_silu(block: nn.Module) -> bool:
    """Return whether a module computes what Mistral's feed-forward block does, by layers of this file."""
    code, known = getattr(type(block).forward, "__code__", None), MistralMLP.forward.__code__
    if any(getattr(code, part, None) != getattr(known, part) for part in ("co_code", "co_names", "co_consts")):
        return False
    is_silu = isinstance(block.act_fn, nn.SiLU | SiLUActivation)
    return is_silu and all(type(part) is OneDnnLinear for part in (block.gate_proj, block.up_proj, block.down_proj))


if onednn_linear is not None and onednn_linear not in flop_registry:

    @register_flop_formula(onednn_linear)
    def _flops(states: Sequence[int], *others: Any, out_shape: Sequence[int], **options: Any) -> int:
        """Return the operations of a product for torch's `FlopCounterMode`, which knows its own products alone."""
        return 2 * math.prod(out_shape) * states[-1]
