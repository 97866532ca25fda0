"""Quantization of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.private import has_vnni, int8_product

Quantization = Literal["int8", "nf4"]
INT8_DTYPES = (torch.float32, torch.bfloat16)


class Int8Linear(nn.Linear):
    """A linear layer whose weight, and each row of its input, are rounded to 8-bit integers. It passes no gradient.

    An output channel and a row have a scale each, their largest magnitude divided by 127. A few rows of a decoder have
    values far above the others', so one scale for all rows would leave the others few steps. Sums of the integers are
    exact. So a row's output does not depend on the other rows.

    Attributes:
        weight: (out_features, in_features) int8.
        scale: (out_features,) float32, one step of each channel's weights.
    """

    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of the input."""
        rows = input.reshape(-1, self.in_features).float()
        integers, step = rounded(rows)
        weight = self.weight.t()
        # Without VNNI torch's integer product is a plain loop. Float32 sums are exact to 2^24, and beyond to 1e-7.
        sums = int8_product(integers, weight) if has_vnni() else integers.float() @ weight.float()
        output = (sums * step).mul_(self.scale)
        if self.bias is not None:
            output += self.bias
        return output.to(input.dtype).view(*input.shape[:-1], self.out_features)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8, by its own scale.

    Args:
        rows: (rows, width) float32.

    Returns:
        the integers, (rows, width) int8 from −127 to 127, and the value of one step of each row, (rows, 1) float32.
    """
    # Two reductions are three times as fast as abs() and one.
    step = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_()).div_(127)
    step.clamp_(min=torch.finfo(step.dtype).tiny)  # a row of zeros
    return (rows / step).round_().to(torch.int8), step


def check_quantization(method: str | None, devices: Sequence[str], dtype: torch.dtype) -> None:
    """Refuse what cannot run, before weights are read.

    Raises:
        ImportError: if "nf4" lacks bitsandbytes.
        ValueError: if there is no such method, or it does not run on these devices or beside this format.
    """
    if method is None:
        return
    if method not in get_args(Quantization):
        raise ValueError(f"quantization is {method!r}, but must be one of {get_args(Quantization)} or None.")
    if len(devices) > 1:
        raise ValueError(f"quantization={method!r} runs on one device, but devices are {list(devices)}.")
    if method == "int8" and (torch.device(devices[0]).type != "cpu" or dtype not in INT8_DTYPES):
        raise ValueError(
            f"quantization='int8' runs on a CPU, with float32 or bfloat16 for all that is not int8, but the device is "
            f"{devices[0]} and dtype {dtype}."
        )
    if method == "nf4" and find_spec("bitsandbytes") is None:
        raise ImportError("quantization='nf4' needs the package bitsandbytes: pip install bitsandbytes")


def quantize(model: CostWiseForCausalLM, method: Quantization) -> None:
    """Hold the decoder layers' weights in fewer bits, in place; embeddings, norms and heads stay as they are.

    "int8" rounds weights and inputs, see `Int8Linear`. "nf4" is `use_nf4`.

    Raises:
        ValueError: if token adapters are attached, which need the weights.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(f"quantization={method!r} leaves no weights to switch token adapters on; merge one of them.")
    if method == "nf4":
        use_nf4(model)
        return
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            integers, step = rounded(module.weight.detach().float())
            module.weight = nn.Parameter(integers, requires_grad=False)
            module.register_buffer("scale", step.squeeze(-1))
            module.__class__ = Int8Linear


def use_nf4(model: CostWiseForCausalLM) -> None:
    """Hold the matrices of the decoder layers in bitsandbytes' NF4 (arXiv 2305.14314, section 3), in place.

    Products are computed in the dtype that the matrices had. The matrices are rounded once, when the model next moves
    to a device, so adapters must be merged before.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            small = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)
            small.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
            small.bias = linear.bias
            # For such CPUs bitsandbytes packs weights that compute in bfloat16 and pass no gradient.
            small.support_avx512bf16_for_cpu = False
            layer.set_submodule(name, small)
    # peft reads this flag of transformers.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
