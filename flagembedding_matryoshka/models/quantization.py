"""Quantization of a model's weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM

Quantization = Literal["int8", "nf4"]


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
    if method == "int8" and (torch.device(devices[0]).type, dtype) != ("cpu", torch.float32):
        raise ValueError(
            f"quantization='int8' runs on a CPU, with float32 for all that is not int8, but the device is {devices[0]} "
            f"and dtype {dtype}."
        )
    if method == "nf4" and find_spec("bitsandbytes") is None:
        raise ImportError("quantization='nf4' needs the package bitsandbytes: pip install bitsandbytes")


def quantize(model: CostWiseForCausalLM, method: Quantization) -> None:
    """Hold the decoder layers' weights in fewer bits, in place; embeddings, norms and heads stay as they are.

    "int8" is PyTorch's dynamic quantization, with a scale for each output channel; inputs are rounded to int8 by the
    range of their batch. torchao's int8 products were 2 to 35 times slower than float32 on a CPU. "nf4" is `use_nf4`.

    Raises:
        ValueError: if token adapters are attached, which need the weights.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(f"quantization={method!r} leaves no weights to switch token adapters on; merge one of them.")
    if method == "nf4":
        use_nf4(model)
        return
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*deprecated", category=UserWarning)
        quantize_dynamic(model.model.layers, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)


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
