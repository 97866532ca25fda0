"""Backbones: the decoders of transformers that run at any depth and width.

A backbone has four classes: configuration, decoder layer, model and causal language model. Each one inherits from a
class of this package first, and then from the class of transformers. `BACKBONES` lists the backbones of this package,
and `register_backbone` adds one from outside. The layers must take attention from `transformers.AttentionInterface`.
Attention refuses a keyword that it does not know, in the first pass.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    ArceeModel,
    AutoConfig,
    AutoModelForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Ernie4_5Model,
    Exaone4Config,
    Exaone4ForCausalLM,
    Exaone4Model,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaModel,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4Model,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    HunYuanDenseV1Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Ministral3Config,
    Ministral3ForCausalLM,
    Ministral3Model,
    MinistralConfig,
    MinistralForCausalLM,
    MinistralModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SeedOssConfig,
    SeedOssForCausalLM,
    SeedOssModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3Model,
)
from transformers.models.arcee.modeling_arcee import ArceeDecoderLayer
from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5DecoderLayer
from transformers.models.exaone4.modeling_exaone4 import Exaone4DecoderLayer
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.glm4.modeling_glm4 import Glm4DecoderLayer
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.ministral.modeling_ministral import MinistralDecoderLayer
from transformers.models.ministral3.modeling_ministral3 import Ministral3DecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.seed_oss.modeling_seed_oss import SeedOssDecoderLayer
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.decoder import CostWiseModel
from flagembedding_matryoshka.models.layers import CostWiseLayer
from flagembedding_matryoshka.models.minicpm import MINICPM, granite_from_minicpm
from flagembedding_matryoshka.models.refusals import refuse_model_type, refuse_not_causal
from flagembedding_matryoshka.models.self_check import self_check
from flagembedding_matryoshka.private import ignore_on_load


@strict
class CostWiseMistralConfig(CostWiseConfig, MistralConfig):
    model_type = "cost_wise_mistral"
    made_from: ClassVar[tuple[str, ...]] = ("mistral",)


class CostWiseMistralDecoderLayer(CostWiseLayer, MistralDecoderLayer):
    pass


class CostWiseMistralModel(CostWiseModel, MistralModel):
    config_class = CostWiseMistralConfig
    layer_class = CostWiseMistralDecoderLayer


class CostWiseMistralForCausalLM(CostWiseForCausalLM, MistralForCausalLM):
    config_class = CostWiseMistralConfig
    model_class = CostWiseMistralModel


@strict
class CostWiseLlamaConfig(CostWiseConfig, LlamaConfig):
    model_type = "cost_wise_llama"
    made_from: ClassVar[tuple[str, ...]] = ("llama",)


class CostWiseLlamaDecoderLayer(CostWiseLayer, LlamaDecoderLayer):
    pass


class CostWiseLlamaModel(CostWiseModel, LlamaModel):
    config_class = CostWiseLlamaConfig
    layer_class = CostWiseLlamaDecoderLayer


class CostWiseLlamaForCausalLM(CostWiseForCausalLM, LlamaForCausalLM):
    config_class = CostWiseLlamaConfig
    model_class = CostWiseLlamaModel


@strict
class CostWiseQwen2Config(CostWiseConfig, Qwen2Config):
    model_type = "cost_wise_qwen2"
    made_from: ClassVar[tuple[str, ...]] = ("qwen2",)


class CostWiseQwen2DecoderLayer(CostWiseLayer, Qwen2DecoderLayer):
    pass


class CostWiseQwen2Model(CostWiseModel, Qwen2Model):
    config_class = CostWiseQwen2Config
    layer_class = CostWiseQwen2DecoderLayer


class CostWiseQwen2ForCausalLM(CostWiseForCausalLM, Qwen2ForCausalLM):
    config_class = CostWiseQwen2Config
    model_class = CostWiseQwen2Model


@strict
class CostWiseQwen3Config(CostWiseConfig, Qwen3Config):
    model_type = "cost_wise_qwen3"
    made_from: ClassVar[tuple[str, ...]] = ("qwen3",)


class CostWiseQwen3DecoderLayer(CostWiseLayer, Qwen3DecoderLayer):
    pass


class CostWiseQwen3Model(CostWiseModel, Qwen3Model):
    config_class = CostWiseQwen3Config
    layer_class = CostWiseQwen3DecoderLayer


class CostWiseQwen3ForCausalLM(CostWiseForCausalLM, Qwen3ForCausalLM):
    config_class = CostWiseQwen3Config
    model_class = CostWiseQwen3Model


@strict
class CostWiseGemma2Config(CostWiseConfig, Gemma2Config):
    model_type = "cost_wise_gemma2"
    made_from: ClassVar[tuple[str, ...]] = ("gemma2",)


class CostWiseGemma2DecoderLayer(CostWiseLayer, Gemma2DecoderLayer):
    pass


class CostWiseGemma2Model(CostWiseModel, Gemma2Model):
    config_class = CostWiseGemma2Config
    layer_class = CostWiseGemma2DecoderLayer


class CostWiseGemma2ForCausalLM(CostWiseForCausalLM, Gemma2ForCausalLM):
    config_class = CostWiseGemma2Config
    model_class = CostWiseGemma2Model

    def finish(self, scores: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return scores if cap is None else torch.tanh(scores / cap) * cap


@strict
class CostWiseGemmaConfig(CostWiseGemma2Config):
    """Configuration of FlagEmbedding's lightweight re-ranker (BAAI/bge-reranker-v2.5-gemma2-lightweight), a Gemma-2."""

    model_type = "cost_wise_gemma"
    made_from: ClassVar[tuple[str, ...]] = ()

    compress_weights: Literal["attention", "equal"] = "equal"
    template: str | dict[str, Any] = "gemma2-lightweight"


class CostWiseGemmaModel(CostWiseGemma2Model):
    config_class = CostWiseGemmaConfig


class CostWiseGemmaForCausalLM(CostWiseGemma2ForCausalLM):
    config_class = CostWiseGemmaConfig
    model_class = CostWiseGemmaModel


@strict
class CostWiseGraniteConfig(CostWiseConfig, GraniteConfig):
    model_type = "cost_wise_granite"
    made_from: ClassVar[tuple[str, ...]] = ("granite", MINICPM)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers. A MiniCPM's configuration is read too: it is a Granite with other names of multipliers.

        Raises:
            ValueError: if its heads are of another kind than one linear map per exit.
        """
        if config_dict.get("model_type") == MINICPM:
            config_dict = granite_from_minicpm(config_dict) | {"model_type": cls.model_type}
        return super().from_dict(config_dict, **kwargs)


class CostWiseGraniteDecoderLayer(CostWiseLayer, GraniteDecoderLayer):
    pass


class CostWiseGraniteModel(CostWiseModel, GraniteModel):
    config_class = CostWiseGraniteConfig
    layer_class = CostWiseGraniteDecoderLayer

    def embeddings(self, token_ids: Tensor) -> Tensor:
        return super().embeddings(token_ids) * self.config.embedding_multiplier


class CostWiseGraniteForCausalLM(CostWiseForCausalLM, GraniteForCausalLM):
    config_class = CostWiseGraniteConfig
    model_class = CostWiseGraniteModel

    def __init__(self, config: CostWiseGraniteConfig) -> None:
        super().__init__(config)
        if config.layer_wise:
            # A MiniCPM that FlagEmbedding's runner trained without LoRA holds a copy of the embedding under this name.
            # The heads do not read it.
            ignore_on_load(self, [r"^lm_head\.weight$"])

    def finish(self, scores: Tensor) -> Tensor:
        return scores / self.config.logits_scaling


@strict
class CostWisePhi3Config(CostWiseConfig, Phi3Config):
    model_type = "cost_wise_phi3"
    made_from: ClassVar[tuple[str, ...]] = ("phi3",)


class CostWisePhi3DecoderLayer(CostWiseLayer, Phi3DecoderLayer):
    pass


class CostWisePhi3Model(CostWiseModel, Phi3Model):
    config_class = CostWisePhi3Config
    layer_class = CostWisePhi3DecoderLayer


class CostWisePhi3ForCausalLM(CostWiseForCausalLM, Phi3ForCausalLM):
    config_class = CostWisePhi3Config
    model_class = CostWisePhi3Model


@strict
class CostWiseGemma1Config(CostWiseConfig, GemmaConfig):
    """Configuration of a Gemma of the first generation. "cost_wise_gemma" is a Gemma-2, see `CostWiseGemmaConfig`."""

    model_type = "cost_wise_gemma1"
    made_from: ClassVar[tuple[str, ...]] = ("gemma",)


class CostWiseGemma1DecoderLayer(CostWiseLayer, GemmaDecoderLayer):
    pass


class CostWiseGemma1Model(CostWiseModel, GemmaModel):
    config_class = CostWiseGemma1Config
    layer_class = CostWiseGemma1DecoderLayer


class CostWiseGemma1ForCausalLM(CostWiseForCausalLM, GemmaForCausalLM):
    config_class = CostWiseGemma1Config
    model_class = CostWiseGemma1Model


@strict
class CostWiseGemma3Config(CostWiseConfig, Gemma3TextConfig):
    model_type = "cost_wise_gemma3"
    made_from: ClassVar[tuple[str, ...]] = ("gemma3_text",)


class CostWiseGemma3DecoderLayer(CostWiseLayer, Gemma3DecoderLayer):
    pass


class CostWiseGemma3Model(CostWiseModel, Gemma3TextModel):
    config_class = CostWiseGemma3Config
    layer_class = CostWiseGemma3DecoderLayer
    rotary_by_layer_type = True


class CostWiseGemma3ForCausalLM(CostWiseForCausalLM, Gemma3ForCausalLM):
    config_class = CostWiseGemma3Config
    model_class = CostWiseGemma3Model

    def finish(self, scores: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return scores if cap is None else torch.tanh(scores / cap) * cap


@strict
class CostWiseSmolLM3Config(CostWiseConfig, SmolLM3Config):
    model_type = "cost_wise_smollm3"
    made_from: ClassVar[tuple[str, ...]] = ("smollm3",)


class CostWiseSmolLM3DecoderLayer(CostWiseLayer, SmolLM3DecoderLayer):
    pass


class CostWiseSmolLM3Model(CostWiseModel, SmolLM3Model):
    config_class = CostWiseSmolLM3Config
    layer_class = CostWiseSmolLM3DecoderLayer


class CostWiseSmolLM3ForCausalLM(CostWiseForCausalLM, SmolLM3ForCausalLM):
    config_class = CostWiseSmolLM3Config
    model_class = CostWiseSmolLM3Model


@strict
class CostWiseOlmo2Config(CostWiseConfig, Olmo2Config):
    model_type = "cost_wise_olmo2"
    made_from: ClassVar[tuple[str, ...]] = ("olmo2",)


class CostWiseOlmo2DecoderLayer(CostWiseLayer, Olmo2DecoderLayer):
    pass


class CostWiseOlmo2Model(CostWiseModel, Olmo2Model):
    config_class = CostWiseOlmo2Config
    layer_class = CostWiseOlmo2DecoderLayer


class CostWiseOlmo2ForCausalLM(CostWiseForCausalLM, Olmo2ForCausalLM):
    config_class = CostWiseOlmo2Config
    model_class = CostWiseOlmo2Model


@strict
class CostWiseMinistralConfig(CostWiseConfig, MinistralConfig):
    model_type = "cost_wise_ministral"
    made_from: ClassVar[tuple[str, ...]] = ("ministral",)


class CostWiseMinistralDecoderLayer(CostWiseLayer, MinistralDecoderLayer):
    pass


class CostWiseMinistralModel(CostWiseModel, MinistralModel):
    config_class = CostWiseMinistralConfig
    layer_class = CostWiseMinistralDecoderLayer


class CostWiseMinistralForCausalLM(CostWiseForCausalLM, MinistralForCausalLM):
    config_class = CostWiseMinistralConfig
    model_class = CostWiseMinistralModel


@strict
class CostWiseMinistral3Config(CostWiseConfig, Ministral3Config):
    model_type = "cost_wise_ministral3"
    made_from: ClassVar[tuple[str, ...]] = ("ministral3",)


class CostWiseMinistral3DecoderLayer(CostWiseLayer, Ministral3DecoderLayer):
    pass


class CostWiseMinistral3Model(CostWiseModel, Ministral3Model):
    config_class = CostWiseMinistral3Config
    layer_class = CostWiseMinistral3DecoderLayer


class CostWiseMinistral3ForCausalLM(CostWiseForCausalLM, Ministral3ForCausalLM):
    config_class = CostWiseMinistral3Config
    model_class = CostWiseMinistral3Model


@strict
class CostWiseGlm4Config(CostWiseConfig, Glm4Config):
    model_type = "cost_wise_glm4"
    made_from: ClassVar[tuple[str, ...]] = ("glm4",)


class CostWiseGlm4DecoderLayer(CostWiseLayer, Glm4DecoderLayer):
    pass


class CostWiseGlm4Model(CostWiseModel, Glm4Model):
    config_class = CostWiseGlm4Config
    layer_class = CostWiseGlm4DecoderLayer


class CostWiseGlm4ForCausalLM(CostWiseForCausalLM, Glm4ForCausalLM):
    config_class = CostWiseGlm4Config
    model_class = CostWiseGlm4Model


@strict
class CostWiseExaone4Config(CostWiseConfig, Exaone4Config):
    model_type = "cost_wise_exaone4"
    made_from: ClassVar[tuple[str, ...]] = ("exaone4",)


class CostWiseExaone4DecoderLayer(CostWiseLayer, Exaone4DecoderLayer):
    pass


class CostWiseExaone4Model(CostWiseModel, Exaone4Model):
    config_class = CostWiseExaone4Config
    layer_class = CostWiseExaone4DecoderLayer


class CostWiseExaone4ForCausalLM(CostWiseForCausalLM, Exaone4ForCausalLM):
    config_class = CostWiseExaone4Config
    model_class = CostWiseExaone4Model


@strict
class CostWiseSeedOssConfig(CostWiseConfig, SeedOssConfig):
    model_type = "cost_wise_seed_oss"
    made_from: ClassVar[tuple[str, ...]] = ("seed_oss",)


class CostWiseSeedOssDecoderLayer(CostWiseLayer, SeedOssDecoderLayer):
    pass


class CostWiseSeedOssModel(CostWiseModel, SeedOssModel):
    config_class = CostWiseSeedOssConfig
    layer_class = CostWiseSeedOssDecoderLayer


class CostWiseSeedOssForCausalLM(CostWiseForCausalLM, SeedOssForCausalLM):
    config_class = CostWiseSeedOssConfig
    model_class = CostWiseSeedOssModel


@strict
class CostWiseHunYuanDenseV1Config(CostWiseConfig, HunYuanDenseV1Config):
    model_type = "cost_wise_hunyuan_v1_dense"
    made_from: ClassVar[tuple[str, ...]] = ("hunyuan_v1_dense",)


class CostWiseHunYuanDenseV1DecoderLayer(CostWiseLayer, HunYuanDenseV1DecoderLayer):
    pass


class CostWiseHunYuanDenseV1Model(CostWiseModel, HunYuanDenseV1Model):
    config_class = CostWiseHunYuanDenseV1Config
    layer_class = CostWiseHunYuanDenseV1DecoderLayer


class CostWiseHunYuanDenseV1ForCausalLM(CostWiseForCausalLM, HunYuanDenseV1ForCausalLM):
    config_class = CostWiseHunYuanDenseV1Config
    model_class = CostWiseHunYuanDenseV1Model


@strict
class CostWiseErnie4_5Config(CostWiseConfig, Ernie4_5Config):
    model_type = "cost_wise_ernie4_5"
    made_from: ClassVar[tuple[str, ...]] = ("ernie4_5",)


class CostWiseErnie4_5DecoderLayer(CostWiseLayer, Ernie4_5DecoderLayer):
    pass


class CostWiseErnie4_5Model(CostWiseModel, Ernie4_5Model):
    config_class = CostWiseErnie4_5Config
    layer_class = CostWiseErnie4_5DecoderLayer


class CostWiseErnie4_5ForCausalLM(CostWiseForCausalLM, Ernie4_5ForCausalLM):
    config_class = CostWiseErnie4_5Config
    model_class = CostWiseErnie4_5Model


@strict
class CostWiseArceeConfig(CostWiseConfig, ArceeConfig):
    model_type = "cost_wise_arcee"
    made_from: ClassVar[tuple[str, ...]] = ("arcee",)


class CostWiseArceeDecoderLayer(CostWiseLayer, ArceeDecoderLayer):
    pass


class CostWiseArceeModel(CostWiseModel, ArceeModel):
    config_class = CostWiseArceeConfig
    layer_class = CostWiseArceeDecoderLayer


class CostWiseArceeForCausalLM(CostWiseForCausalLM, ArceeForCausalLM):
    config_class = CostWiseArceeConfig
    model_class = CostWiseArceeModel


BACKBONES: tuple[type[CostWiseForCausalLM], ...] = (
    CostWiseMistralForCausalLM,
    CostWiseLlamaForCausalLM,
    CostWiseQwen2ForCausalLM,
    CostWiseQwen3ForCausalLM,
    CostWiseGemma2ForCausalLM,
    CostWiseGemmaForCausalLM,
    CostWiseGraniteForCausalLM,
    CostWisePhi3ForCausalLM,
    CostWiseGemma1ForCausalLM,
    CostWiseGemma3ForCausalLM,
    CostWiseSmolLM3ForCausalLM,
    CostWiseOlmo2ForCausalLM,
    CostWiseMinistralForCausalLM,
    CostWiseMinistral3ForCausalLM,
    CostWiseGlm4ForCausalLM,
    CostWiseExaone4ForCausalLM,
    CostWiseSeedOssForCausalLM,
    CostWiseHunYuanDenseV1ForCausalLM,
    CostWiseErnie4_5ForCausalLM,
    CostWiseArceeForCausalLM,
)
_BY_MODEL_TYPE: dict[str, type[CostWiseForCausalLM]] = {}


def register_backbone(model: type[CostWiseForCausalLM]) -> None:
    """Let checkpoints of a backbone be loaded, here and by transformers' AutoConfig and AutoModelForCausalLM.

    Raises:
        ValueError: if another class loads one of its model types, or the backbone does not score as transformers' own
            model, see [`~flagembedding_matryoshka.models.self_check.self_check`].
    """
    self_check(model)
    _register(model)


def _register(model: type[CostWiseForCausalLM]) -> None:
    config = model.config_class
    names = (config.model_type, *config.made_from)
    for name in names:
        present = _BY_MODEL_TYPE.get(name, model)
        if present is not model:
            raise ValueError(f"checkpoints of model type {name!r} are loaded by {present.__name__} already.")
    _BY_MODEL_TYPE.update(dict.fromkeys(names, model))
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


def read_config(path: str | PathLike[str], **hub: Any) -> CostWiseConfig:
    """Read the configuration of a checkpoint that a re-ranker can be loaded or made from.

    Args:
        hub: `cache_dir`, `token`, … as in transformers.

    Raises:
        ValueError: if no backbone has its model type, or the model is not a causal decoder.
    """
    stored, _ = PreTrainedConfig.get_config_dict(path, **hub)
    model_type = stored.get("model_type", "")
    refuse_model_type(path, model_type, _BY_MODEL_TYPE)
    refuse_not_causal(path, stored)
    return _BY_MODEL_TYPE[model_type].config_class.from_dict(stored)


def causal_lm_class(config: Any) -> type[CostWiseForCausalLM]:
    """Return the class of the re-rankers with a configuration, or with a class of configurations."""
    return _BY_MODEL_TYPE[config.model_type]


for _model in BACKBONES:
    _register(_model)  # The first load checks it, so that importing the package is quick.
