"""Matryoshka (CostWise) re-rankers: one model, any depth and width."""

from typing import TYPE_CHECKING, Any

from flagembedding_matryoshka.models.backbones import (
    CostWiseGemma2Config,
    CostWiseGemma2ForCausalLM,
    CostWiseGemma2Model,
    CostWiseGemmaConfig,
    CostWiseGemmaForCausalLM,
    CostWiseGemmaModel,
    CostWiseGraniteConfig,
    CostWiseGraniteForCausalLM,
    CostWiseGraniteModel,
    CostWiseLlamaConfig,
    CostWiseLlamaForCausalLM,
    CostWiseLlamaModel,
    CostWiseMistralConfig,
    CostWiseMistralForCausalLM,
    CostWiseMistralModel,
    CostWisePhi3Config,
    CostWisePhi3ForCausalLM,
    CostWisePhi3Model,
    CostWiseQwen2Config,
    CostWiseQwen2ForCausalLM,
    CostWiseQwen2Model,
    CostWiseQwen3Config,
    CostWiseQwen3ForCausalLM,
    CostWiseQwen3Model,
)
from flagembedding_matryoshka.models.heads import CostWiseHead
from flagembedding_matryoshka.models.outputs import CostWiseCausalLMOutputWithPast, CostWiseModelOutputWithPast
from flagembedding_matryoshka.models.shipped import SMOLLM2
from flagembedding_matryoshka.setting import Setting

if TYPE_CHECKING:
    from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
    from flagembedding_matryoshka.registry import register

SubNetwork = Setting
"""The first version's name of it."""

__all__ = [
    "SMOLLM2",
    "CostWiseCausalLMOutputWithPast",
    "CostWiseGemma2Config",
    "CostWiseGemma2ForCausalLM",
    "CostWiseGemma2Model",
    "CostWiseGemmaConfig",
    "CostWiseGemmaForCausalLM",
    "CostWiseGemmaModel",
    "CostWiseGraniteConfig",
    "CostWiseGraniteForCausalLM",
    "CostWiseGraniteModel",
    "CostWiseHead",
    "CostWiseLlamaConfig",
    "CostWiseLlamaForCausalLM",
    "CostWiseLlamaModel",
    "CostWiseMistralConfig",
    "CostWiseMistralForCausalLM",
    "CostWiseMistralModel",
    "CostWiseModelOutputWithPast",
    "CostWisePhi3Config",
    "CostWisePhi3ForCausalLM",
    "CostWisePhi3Model",
    "CostWiseQwen2Config",
    "CostWiseQwen2ForCausalLM",
    "CostWiseQwen2Model",
    "CostWiseQwen3Config",
    "CostWiseQwen3ForCausalLM",
    "CostWiseQwen3Model",
    "MatryoshkaReranker",
    "Setting",
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
