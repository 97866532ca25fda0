"""Matryoshka (CostWise) Mistral re-rankers: one model, any depth and width."""

from typing import TYPE_CHECKING, Any

from flagembedding_matryoshka.models.configuration import CostWiseMistralConfig, SubNetwork
from flagembedding_matryoshka.models.decoder import (
    CostWiseCausalLMOutputWithPast,
    CostWiseHead,
    CostWiseMistralForCausalLM,
    CostWiseMistralModel,
    CostWiseModelOutputWithPast,
)
from flagembedding_matryoshka.models.shipped import SMOLLM2

if TYPE_CHECKING:
    from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
    from flagembedding_matryoshka.registry import register

__all__ = [
    "SMOLLM2",
    "CostWiseCausalLMOutputWithPast",
    "CostWiseHead",
    "CostWiseMistralConfig",
    "CostWiseMistralForCausalLM",
    "CostWiseMistralModel",
    "CostWiseModelOutputWithPast",
    "MatryoshkaReranker",
    "SubNetwork",
    "register",
]


def __getattr__(name: str) -> Any:
    # FlagEmbedding takes seconds to import: only who asks for what needs it waits for it.
    if name == "MatryoshkaReranker":
        from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker

        return MatryoshkaReranker
    if name == "register":
        from flagembedding_matryoshka.registry import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
