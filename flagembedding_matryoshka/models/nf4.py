"""Weights in the 4 bits of QLoRA."""

from __future__ import annotations

from torch import nn

from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM


def use_nf4(model: CostWiseForCausalLM) -> None:
    """Hold the matrices of the decoder layers in bitsandbytes' NF4 (arXiv 2305.14314, section 3), in place.

    Products are computed in the format that the matrices had. They are rounded when the model next moves to a device,
    once: adapters are to be merged before.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            small = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)
            small.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
            small.bias = linear.bias
            # What bitsandbytes packs for such CPUs computes in bfloat16, and lets no gradient through ever after.
            small.support_avx512bf16_for_cpu = False
            layer.set_submodule(name, small)
    # Where transformers notes it, and peft looks.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
