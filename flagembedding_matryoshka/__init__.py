"""Matryoshka (CostWise) Mistral re-rankers: one model, any depth and width."""

from flagembedding_matryoshka.configuration import CostWiseMistralConfig, SubNetwork
from flagembedding_matryoshka.modeling import (
    CostWiseCausalLMOutputWithPast,
    CostWiseHead,
    CostWiseMistralForCausalLM,
    CostWiseMistralModel,
    CostWiseModelOutputWithPast,
)

__all__ = [
    "CostWiseCausalLMOutputWithPast",
    "CostWiseHead",
    "CostWiseMistralConfig",
    "CostWiseMistralForCausalLM",
    "CostWiseMistralModel",
    "CostWiseModelOutputWithPast",
    "SubNetwork",
]
