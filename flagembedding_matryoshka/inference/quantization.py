"""Weights in fewer bits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import nn
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratios
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.nf4 import use_nf4

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
    range of their batch. torchao's int8 products were 2 to 35 times slower than float32 on a CPU. "nf4" is
    [`~flagembedding_matryoshka.models.nf4.use_nf4`].

    Raises:
        ValueError: if token adapters are attached, which need the weights.
    """
    if token_adapter_ratios(model):
        raise ValueError(f"quantization={method!r} leaves no weights to switch token adapters on; merge one of them.")
    if method == "nf4":
        use_nf4(model)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*deprecated", category=UserWarning)
        quantize_dynamic(model.model.layers, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)
