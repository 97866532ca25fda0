"""Which modules get an adapter, checked before the weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from flagembedding_matryoshka.models.backbones import causal_lm_class
from flagembedding_matryoshka.models.configuration import CostWiseConfig

ALL_LINEAR = "all-linear"
"""peft's word for every linear module."""


def as_peft_takes_them(target_modules: Sequence[str] | str | None) -> list[str] | str | None:
    """Return names of modules as a list, and a regular expression or "all-linear" as a string.

    Args:
        target_modules: as from the command line, where a single value is a list, too. A single value that is no name
            (letters, digits, "_" and ".") is a regular expression.
    """
    if target_modules is None or isinstance(target_modules, str):
        return target_modules
    if len(target_modules) == 1 and not re.fullmatch(r"[\w.]+", target_modules[0]):
        return target_modules[0]
    return list(target_modules)


def refuse_unknown_modules(
    config: CostWiseConfig,
    target_modules: Sequence[str] | str | None,
    modules_to_save: Sequence[str] | None,
) -> None:
    """Raise ValueError on names of modules that the model does not have. No weights are read.

    Args:
        config: of the layer-wise model.
        target_modules: as `as_peft_takes_them` returns them; None is not checked.
        modules_to_save: names of modules; None is not checked.
    """
    if target_modules in (None, ALL_LINEAR) and not modules_to_save:
        return
    with torch.device("meta"):
        modules = dict(causal_lm_class(config)(config).named_modules())
    model = f"a {config.model_type.removeprefix('cost_wise_')} re-ranker"
    matrices = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Embedding)]
    if isinstance(target_modules, str):
        if target_modules != ALL_LINEAR and not any(re.fullmatch(target_modules, name) for name in matrices):
            raise ValueError(
                f"target_modules={target_modules!r} is a regular expression that matches the whole name of no linear "
                f"module, as {matrices[-1]!r} is one. {_known(matrices)}"
            )
    elif target_modules is not None:
        unknown = [name for name in target_modules if not any(f".{key}".endswith(f".{name}") for key in matrices)]
        if unknown:
            raise ValueError(f"target_modules: {model} has no {', '.join(unknown)}. {_known(matrices)}")
    # peft compares the ends of names here, and cannot save lists of modules
    whole = [name for name, module in modules.items() if not isinstance(module, nn.ModuleList | nn.ModuleDict)]
    unknown = [name for name in modules_to_save or () if not any(key.endswith(name) for key in whole)]
    if unknown:
        learning = [name for name in whole if any(True for _ in modules[name].parameters(recurse=False))]
        raise ValueError(f"modules_to_save: {model} has no {', '.join(unknown)}. {_known(learning)}")


def _known(names: Iterable[str]) -> str:
    return f"It has {', '.join(sorted({name.rpartition('.')[2] for name in names}))}."
