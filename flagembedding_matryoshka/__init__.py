"""Matryoshka (CostWise) re-rankers: one model, any depth and width."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import flagembedding_matryoshka.quiet  # noqa: F401
from flagembedding_matryoshka.models.deferred import register_deferred

if TYPE_CHECKING:
    from flagembedding_matryoshka.checkpoints.gguf import SMOLLM2
    from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
    from flagembedding_matryoshka.models.backbones import (
        CostWiseArceeConfig,
        CostWiseArceeForCausalLM,
        CostWiseArceeModel,
        CostWiseErnie4_5Config,
        CostWiseErnie4_5ForCausalLM,
        CostWiseErnie4_5Model,
        CostWiseExaone4Config,
        CostWiseExaone4ForCausalLM,
        CostWiseExaone4Model,
        CostWiseGemma1Config,
        CostWiseGemma1ForCausalLM,
        CostWiseGemma1Model,
        CostWiseGemma2Config,
        CostWiseGemma2ForCausalLM,
        CostWiseGemma2Model,
        CostWiseGemma3Config,
        CostWiseGemma3ForCausalLM,
        CostWiseGemma3Model,
        CostWiseGemmaConfig,
        CostWiseGemmaForCausalLM,
        CostWiseGemmaModel,
        CostWiseGlm4Config,
        CostWiseGlm4ForCausalLM,
        CostWiseGlm4Model,
        CostWiseGraniteConfig,
        CostWiseGraniteForCausalLM,
        CostWiseGraniteModel,
        CostWiseHunYuanDenseV1Config,
        CostWiseHunYuanDenseV1ForCausalLM,
        CostWiseHunYuanDenseV1Model,
        CostWiseLlamaConfig,
        CostWiseLlamaForCausalLM,
        CostWiseLlamaModel,
        CostWiseMinistral3Config,
        CostWiseMinistral3ForCausalLM,
        CostWiseMinistral3Model,
        CostWiseMinistralConfig,
        CostWiseMinistralForCausalLM,
        CostWiseMinistralModel,
        CostWiseMistralConfig,
        CostWiseMistralForCausalLM,
        CostWiseMistralModel,
        CostWiseOlmo2Config,
        CostWiseOlmo2ForCausalLM,
        CostWiseOlmo2Model,
        CostWisePhi3Config,
        CostWisePhi3ForCausalLM,
        CostWisePhi3Model,
        CostWiseQwen2Config,
        CostWiseQwen2ForCausalLM,
        CostWiseQwen2Model,
        CostWiseQwen3Config,
        CostWiseQwen3ForCausalLM,
        CostWiseQwen3Model,
        CostWiseSeedOssConfig,
        CostWiseSeedOssForCausalLM,
        CostWiseSeedOssModel,
        CostWiseSmolLM3Config,
        CostWiseSmolLM3ForCausalLM,
        CostWiseSmolLM3Model,
    )
    from flagembedding_matryoshka.models.causal_lm import CostWiseCausalLMOutputWithPast, CostWiseHead
    from flagembedding_matryoshka.models.decoder import CostWiseModelOutputWithPast
    from flagembedding_matryoshka.registry import register
    from flagembedding_matryoshka.setting import Setting
    from flagembedding_matryoshka.setting import Setting as SubNetwork

__all__ = [
    "SMOLLM2",
    "CostWiseArceeConfig",
    "CostWiseArceeForCausalLM",
    "CostWiseArceeModel",
    "CostWiseCausalLMOutputWithPast",
    "CostWiseErnie4_5Config",
    "CostWiseErnie4_5ForCausalLM",
    "CostWiseErnie4_5Model",
    "CostWiseExaone4Config",
    "CostWiseExaone4ForCausalLM",
    "CostWiseExaone4Model",
    "CostWiseGemma1Config",
    "CostWiseGemma1ForCausalLM",
    "CostWiseGemma1Model",
    "CostWiseGemma2Config",
    "CostWiseGemma2ForCausalLM",
    "CostWiseGemma2Model",
    "CostWiseGemma3Config",
    "CostWiseGemma3ForCausalLM",
    "CostWiseGemma3Model",
    "CostWiseGemmaConfig",
    "CostWiseGemmaForCausalLM",
    "CostWiseGemmaModel",
    "CostWiseGlm4Config",
    "CostWiseGlm4ForCausalLM",
    "CostWiseGlm4Model",
    "CostWiseGraniteConfig",
    "CostWiseGraniteForCausalLM",
    "CostWiseGraniteModel",
    "CostWiseHead",
    "CostWiseHunYuanDenseV1Config",
    "CostWiseHunYuanDenseV1ForCausalLM",
    "CostWiseHunYuanDenseV1Model",
    "CostWiseLlamaConfig",
    "CostWiseLlamaForCausalLM",
    "CostWiseLlamaModel",
    "CostWiseMinistral3Config",
    "CostWiseMinistral3ForCausalLM",
    "CostWiseMinistral3Model",
    "CostWiseMinistralConfig",
    "CostWiseMinistralForCausalLM",
    "CostWiseMinistralModel",
    "CostWiseMistralConfig",
    "CostWiseMistralForCausalLM",
    "CostWiseMistralModel",
    "CostWiseModelOutputWithPast",
    "CostWiseOlmo2Config",
    "CostWiseOlmo2ForCausalLM",
    "CostWiseOlmo2Model",
    "CostWisePhi3Config",
    "CostWisePhi3ForCausalLM",
    "CostWisePhi3Model",
    "CostWiseQwen2Config",
    "CostWiseQwen2ForCausalLM",
    "CostWiseQwen2Model",
    "CostWiseQwen3Config",
    "CostWiseQwen3ForCausalLM",
    "CostWiseQwen3Model",
    "CostWiseSeedOssConfig",
    "CostWiseSeedOssForCausalLM",
    "CostWiseSeedOssModel",
    "CostWiseSmolLM3Config",
    "CostWiseSmolLM3ForCausalLM",
    "CostWiseSmolLM3Model",
    "MatryoshkaReranker",
    "Setting",
    "SubNetwork",
    "register",
]

# transformers and FlagEmbedding take seconds to import, so they are imported when a name is used.
_MODULES = {
    "MatryoshkaReranker": "inference.reranker",
    "CostWiseHead": "models.causal_lm",
    "CostWiseCausalLMOutputWithPast": "models.causal_lm",
    "CostWiseModelOutputWithPast": "models.decoder",
    "SMOLLM2": "checkpoints.gguf",
    "Setting": "setting",
    "SubNetwork": "setting",
    "register": "registry",
}
_FIRST_NAMES = {"SubNetwork": "Setting"}

register_deferred()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES.get(name, 'models.backbones')}")
    return getattr(module, _FIRST_NAMES.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
