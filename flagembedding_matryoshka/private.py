"""The private names of torch, transformers, peft, accelerate and datasets that this package uses.

A release of a library may change a private name without notice. Each name stands here once and has a test, so that an
upgrade of a library changes this file alone. The exception is a method that a subclass overrides: it has the library's
name in its own class, and `OVERRIDDEN` lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from operator import attrgetter
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_unflatten as tree_unflatten
from transformers import PreTrainedModel
from transformers.utils import cached_file

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from peft.tuners.tuners_utils import BaseTunerLayer

ModelClass = TypeVar("ModelClass", bound=type[PreTrainedModel])

OVERRIDDEN: Mapping[str, tuple[str, ...]] = {
    # finetune/trainer.py
    "transformers.Trainer": (
        "_get_train_sampler",
        "_load_best_model",
        "_load_from_checkpoint",
        "_prepare_inputs",  # called, not overridden
        "_run_epoch",
        "_save",
        "_save_rng_state",
    ),
    "FlagEmbedding.abc.finetune.reranker.AbsRerankerTrainer": ("_save_processing_class",),  # called, not overridden
    # finetune/sharding.py: accelerate reads it from a model that need not be a PreTrainedModel
    "transformers.PreTrainedModel": ("_no_split_modules",),
}
"""For each class of a library, the private names that a subclass of this package overrides or calls."""

onednn_linear: Any = None
"""oneDNN's linear layer on a CPU, without a gradient; None if torch was built without oneDNN.

Arguments are states, (..., in), weight, (out, in), bias or None, and the operation after it: "none" or "swish", [], "".
`onednn_linear.binary` takes states, factor, (..., out), weight, bias, "mul". torch.compile takes both when it freezes a
model.
"""
onednn_order: Any = None
"""Takes a weight, (out, in), and None; returns it in the order in which `onednn_linear` reads it fastest."""
if torch.backends.mkldnn.is_available():
    onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    onednn_order = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)

int8_product: Callable[[Tensor, Tensor], Tensor] = torch._int_mm
"""Returns the product of two int8 matrices, (rows, in) and (in, out), in int32. It is fast if `has_vnni()`."""
has_vnni: Callable[[], bool] = torch.cpu._is_vnni_supported
"""Returns whether the processor has AVX-512's instructions for products of 8-bit integers."""

version_of: Callable[[Tensor], int] = attrgetter("_version")
"""Returns how often a tensor was changed in place."""


class BackboneAttention:
    """Base class of models whose next base is a backbone of transformers.

    transformers looks into the source of a class's module to see whether attention can be replaced. A class from a
    notebook has no such source, so the backbone's class is asked.
    """

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        bases: Any = cls.__mro__
        return bases[bases.index(BackboneAttention) + 1]._can_set_attn_implementation()


def takes_attention_from_interface(model: type[PreTrainedModel] | PreTrainedModel) -> bool:
    """Return whether a model's layers take attention from `transformers.AttentionInterface`."""
    return model._can_set_attn_implementation()


def attention_of(model: PreTrainedModel) -> str:
    """Return the name in `transformers.AttentionInterface` of the attention that a model's layers use."""
    return model.config._attn_implementation


def get_whole_modules(model: Any) -> set[str]:
    """Return the names of module classes that accelerate and FSDP leave whole on one device."""
    return set(model._no_split_modules or ())


def set_whole_modules(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Set the names of module classes that accelerate and FSDP leave whole on one device."""
    model._no_split_modules = set(names)


def keeps_in_float32(*names: str) -> Any:
    """Return a class decorator: `from_pretrained` loads modules of these names in float32, whatever the dtype."""

    def decorate(model: ModelClass) -> ModelClass:
        model._keep_in_fp32_modules_strict = set(names)
        return model

    return decorate


def ignore_on_load(model: PreTrainedModel, patterns: Iterable[str]) -> None:
    """Let `from_pretrained` ignore weights of a checkpoint whose names match one of these regular expressions, too."""
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *patterns}


def untie_weights(model: PreTrainedModel) -> None:
    """Let no weight of a model be tied to another one."""
    model._tied_weights_keys = {}
    model.all_tied_weights_keys = {}


def save_under_own_names(model: PreTrainedModel) -> None:
    """Let `save_pretrained` use the names of weights in the model. They may have other names in the checkpoint."""
    model._weight_conversions = []  # type: ignore[assignment]


def find_file(path: str | PathLike[str], name: str, **hub: Any) -> str | None:
    """Return the path of a checkpoint's file, from a directory, the cache or the hub; None if the file does not exist.

    Args:
        hub: arguments of `transformers.utils.cached_file`, such as `revision`.

    Raises:
        OSError: if the checkpoint does not exist, or the hub cannot be reached.
    """
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)


def adapters_of(layer: BaseTunerLayer) -> set[str]:
    """Return the names of the adapters that a layer of peft has."""
    return layer._get_available_adapters()


def selected_rows(rows: Dataset) -> pa.ChunkedArray | None:
    """Return the indices of a data set's rows in its table, in order; None if these are all rows of the table.

    `Dataset` itself takes 100 times as long to read a column of selected rows.
    """
    return None if rows._indices is None else rows._indices.column(0)


def compiler_options(options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Return a context manager that sets options of torch.compile's tracer inside."""
    return torch._dynamo.config.patch(dict(options))
