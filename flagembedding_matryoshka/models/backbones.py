"""The decoders that can be run at any depth and width, each with what is different about it.

A further one is a paragraph like these: its configuration, decoder layer, model and causal language model from
transformers, each behind ours, and a line in `BACKBONES`, or a call of `register_backbone` by whoever adds one from
outside. Its layers must take attention from `transformers.AttentionInterface`; what they hand to it that is not
understood there is refused when it first runs.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
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
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.decoder import CostWiseModel
from flagembedding_matryoshka.models.layers import CostWiseLayer
from flagembedding_matryoshka.models.minicpm import MINICPM, granite_from_minicpm


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
    """Of FlagEmbedding's published lightweight re-ranker (BAAI/bge-reranker-v2.5-gemma2-lightweight), a Gemma-2."""

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
        """Also of a MiniCPM, a Granite with other names for its multipliers.

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
            ignored = self._keys_to_ignore_on_load_unexpected or ()
            self._keys_to_ignore_on_load_unexpected = {*ignored, r"^lm_head\.weight$"}

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


BACKBONES: tuple[type[CostWiseForCausalLM], ...] = (
    CostWiseMistralForCausalLM,
    CostWiseLlamaForCausalLM,
    CostWiseQwen2ForCausalLM,
    CostWiseQwen3ForCausalLM,
    CostWiseGemma2ForCausalLM,
    CostWiseGemmaForCausalLM,
    CostWiseGraniteForCausalLM,
    CostWisePhi3ForCausalLM,
)
_BY_MODEL_TYPE: dict[str, type[CostWiseForCausalLM]] = {}


def register_backbone(model: type[CostWiseForCausalLM]) -> None:
    """Let checkpoints of a backbone be loaded, here and by transformers' AutoConfig and AutoModelForCausalLM.

    Raises:
        ValueError: if another class loads one of its model types.
    """
    config = model.config_class
    for name in (config.model_type, *config.made_from):
        present = _BY_MODEL_TYPE.setdefault(name, model)
        if present is not model:
            raise ValueError(f"checkpoints of model type {name!r} are loaded by {present.__name__} already.")
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


def read_config(path: str | PathLike[str], **hub: Any) -> CostWiseConfig:
    """The configuration of any checkpoint that a re-ranker can be loaded or made from.

    Args:
        hub: `cache_dir`, `token`, … as in transformers.

    Raises:
        ValueError: if there is no backbone of its model type.
    """
    stored, _ = PreTrainedConfig.get_config_dict(path, **hub)
    model = _BY_MODEL_TYPE.get(stored.get("model_type", ""))
    if model is None:
        raise ValueError(
            f"{path} holds a model of type {stored.get('model_type')!r}; a re-ranker is made or loaded from one of "
            f"{', '.join(_BY_MODEL_TYPE)}."
        )
    return model.config_class.from_dict(stored)


def causal_lm_class(config: Any) -> type[CostWiseForCausalLM]:
    """The re-ranker that a configuration, or a class of them, describes."""
    return _BY_MODEL_TYPE[config.model_type]


for _model in BACKBONES:
    register_backbone(_model)
