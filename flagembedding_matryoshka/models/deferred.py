"""transformers' Auto classes find our models, which are imported when one of them is first asked for."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig

MODEL_TYPES = tuple(
    f"cost_wise_{name}"
    for name in (
        "arcee",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma1",
        "gemma2",
        "gemma3",
        "glm4",
        "granite",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
    )
)


class DeferredConfig:
    """In the place of a configuration class, until importing the backbones puts the class there."""

    model_type: ClassVar[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._class()(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return cls._class().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._class().from_pretrained(*args, **kwargs)

    @classmethod
    def _class(cls) -> Any:
        from flagembedding_matryoshka.models.backbones import causal_lm_class

        return causal_lm_class(cls).config_class


def register_deferred() -> None:
    """Let AutoConfig know our model types; their classes take these places when they are imported."""
    for name in MODEL_TYPES:
        deferred = type(f"Deferred_{name}", (DeferredConfig,), {"model_type": name})
        AutoConfig.register(name, deferred, exist_ok=True)
