"""transformers' Auto classes find our models, which are imported when one of them is first asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Any, ClassVar

AUTO = "transformers.models.auto.configuration_auto"
"""transformers' module of AutoConfig. It imports torch, which takes seconds."""
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


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register(module)


class _Finder(MetaPathFinder):
    """Find `AUTO`, with a loader that registers our model types after it has loaded the module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is None or found.origin is None:
            return None
        return spec_from_file_location(fullname, found.origin, loader=_Loader(fullname, found.origin))


def register_deferred() -> None:
    """Let AutoConfig know our model types; their classes take these places when they are imported.

    If AutoConfig has not been imported, this happens when it is. Importing this package does not import torch.
    """
    if AUTO in sys.modules:
        _register(sys.modules[AUTO])
    else:
        sys.meta_path.insert(0, _Finder())


def _register(auto: ModuleType) -> None:
    for name in MODEL_TYPES:
        deferred = type(f"Deferred_{name}", (DeferredConfig,), {"model_type": name})
        auto.AutoConfig.register(name, deferred, exist_ok=True)
