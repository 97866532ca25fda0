"""Checkpoints in: raw, layer-wise, and directories that fine-tuning wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from flagembedding_matryoshka.models.backbones import causal_lm_class, read_config
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import COMPRESS_RATIOS, DEFAULT_START_LAYER, CostWiseConfig
from flagembedding_matryoshka.models.gguf import resolve
from flagembedding_matryoshka.models.shipped import locate
from flagembedding_matryoshka.text.pairs import find_head_token_id

DEFAULT_LAYER_SEP = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a path holds.

    Attributes:
        path: where it lies; unless `base` differs, its weights are used.
        base: where the weights lie that adapters are merged into, or the name that finds them.
        adapters: LoRA adapters to merge, in order.
        config: the layer-wise model to build.
        from_raw: whether `base` is a raw language model, whose heads are made while loading.
    """

    path: str
    base: str
    config: CostWiseConfig
    from_raw: bool
    adapters: list[str] = field(default_factory=list)


def inspect_checkpoint(
    path: str,
    from_raw: bool | None = None,
    start_layer: int = DEFAULT_START_LAYER,
    layer_sep: int = DEFAULT_LAYER_SEP,
    max_layer: int | None = None,
    exits: Sequence[int] | None = None,
    **hub: Any,
) -> Checkpoint:
    """Read what lies at `path`, without its weights, and decide how to load it.

    Args:
        path: a local directory, a name on the hub, a GGUF file, which is then converted, or one of the names that
            [`~flagembedding_matryoshka.models.shipped.locate`] knows.
        from_raw: True or False insists on a raw or a layer-wise checkpoint; None takes either.
        start_layer, layer_sep: the exits to give a raw checkpoint.
        max_layer: layers above this one are not loaded.
        exits: the exits to give a raw checkpoint, one by one, instead of evenly spaced ones; layers above the last
            of them are not loaded.
        hub: `cache_dir`, `token`, … as in transformers.

    Raises:
        FileNotFoundError: if `path` looks like a local directory and does not exist.
        ImportError: if a GGUF file is to be converted and the package `gguf` is missing, or the package that a name
            stands for.
        ValueError: if there is no backbone for it, it is not of the kind or with the exits asked for, or a GGUF file
            that cannot be converted.
    """
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    adapters: list[str] = []
    base, path = path, locate(path)
    readable = resolve(path, hub.get("cache_dir"))
    if find_adapter_config_file(readable, **hub) is not None:
        base = PeftConfig.from_pretrained(readable, **hub).base_model_name_or_path
        adapters.append(path)
    config = read_config(readable, **hub)
    is_raw = not config.layer_wise
    if from_raw is not None and from_raw != is_raw:
        kind = "a raw checkpoint without heads" if is_raw else "a layer-wise checkpoint that has its heads"
        raise ValueError(f"from_raw={from_raw}, but {path} is {kind}.")
    if is_raw:
        config.layer_wise, config.start_layer, config.layer_sep = True, start_layer, layer_sep
        config.exits = None if exits is None else list(exits)
        if exits is not None:
            if (start_layer, layer_sep, max_layer) != (DEFAULT_START_LAYER, DEFAULT_LAYER_SEP, None):
                raise ValueError(
                    f"exits={config.exits} say all: leave out start_layer={start_layer}, layer_sep={layer_sep} and "
                    f"max_layer={max_layer}."
                )
            max_layer = config.exit_layers[-1]
    else:
        _refuse_other_exits(path, config, start_layer, layer_sep, exits)
    if max_layer is not None:
        _cut(config, max_layer)
    return Checkpoint(path, base, config, is_raw, [*config.raw_peft, *adapters])


def _refuse_other_exits(
    path: str, config: CostWiseConfig, start_layer: int, layer_sep: int, exits: Sequence[int] | None
) -> None:
    if exits is not None and list(exits) != config.exit_layers:
        raise ValueError(
            f"exits={list(exits)}, but the heads of {path} were trained for {config.exit_layers}. Exits can be chosen "
            "for a raw checkpoint only."
        )
    for name, asked, default in (
        ("start_layer", start_layer, DEFAULT_START_LAYER),
        ("layer_sep", layer_sep, DEFAULT_LAYER_SEP),
    ):
        if asked not in (default, getattr(config, name)):
            raise ValueError(
                f"{name}={asked}, but the heads of {path} were trained with {name}={getattr(config, name)}. "
                "Exits can be chosen for a raw checkpoint only."
            )


def _cut(config: CostWiseConfig, max_layer: int) -> None:
    shallowest = config.exit_layers[0]
    if not shallowest <= max_layer <= config.num_hidden_layers:
        raise ValueError(
            f"max_layer={max_layer} leaves no exit or no layer to load: it must lie between the shallowest exit "
            f"{shallowest} and the model's {config.num_hidden_layers} layers."
        )
    config.cut(max_layer)


def load_tokenizer(
    path: str, trust_remote_code: bool = False, use_fast: bool = True, **hub: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, or that of the base where adapters lie without one; it pads on the right."""
    readable = resolve(locate(path), hub.get("cache_dir"))
    if (
        find_adapter_config_file(readable, **hub) is not None
        and cached_file(readable, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **hub) is None
    ):
        base = PeftConfig.from_pretrained(readable, **hub).base_model_name_or_path
        return load_tokenizer(base, trust_remote_code, use_fast, **hub)
    return AutoTokenizer.from_pretrained(
        readable, trust_remote_code=trust_remote_code, use_fast=use_fast, padding_side="right", **hub
    )


def load_model(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    peft_paths: Sequence[str] = (),
    attach_token_adapters: bool = False,
    **hub: Any,
) -> CostWiseForCausalLM:
    """Load the weights and merge the checkpoint's own adapters, then `peft_paths`, one after another.

    Args:
        attach_token_adapters: keep adapters that make up for a compression ratio apart, switched off, so that
            `use_token_adapter` can choose among them; False merges them as all others.

    Raises:
        FileNotFoundError: if an adapter has no adapter_config.json.
        ValueError: if two adapters to attach are for the same ratio, or an adapter is for the heads of other exits.
    """
    adapters = [*checkpoint.adapters, *map(locate, peft_paths)]
    for adapter in adapters:
        if find_adapter_config_file(adapter, **hub) is None:
            raise FileNotFoundError(f"there is no adapter (adapter_config.json) at {adapter}")
        refuse_other_heads(adapter, checkpoint.config, **hub)
    config = checkpoint.config
    if checkpoint.from_raw and config.head_token_id is None:
        config.head_token_id = find_head_token_id(tokenizer)
    located = locate(checkpoint.base)
    base = resolve(located, hub.get("cache_dir"))
    model = causal_lm_class(config).from_pretrained(base, config=config, dtype=dtype, **hub)
    if base != located:
        # Adapters that are trained on the model note this as their base: the GGUF, or the name that finds it on any
        # machine, not the cache it was converted into.
        is_name = located != checkpoint.base
        model.name_or_path = checkpoint.base if is_name else str(Path(located).expanduser().absolute())
    attached: dict[int, str] = {}
    for adapter in adapters:
        ratio = token_adapter_ratio(adapter, **hub) if attach_token_adapters else None
        if ratio is None:
            model = PeftModel.from_pretrained(model, adapter, **hub).merge_and_unload()
        elif ratio in attached:
            raise ValueError(f"{attached[ratio]} and {adapter} are both token adapters for compress_ratio={ratio}.")
        else:
            attached[ratio] = adapter
    for ratio, adapter in attached.items():
        # Adapters go into the model's own layers; the wrapper around it is not needed.
        PeftModel.from_pretrained(model, adapter, adapter_name=_token_adapter_name(ratio), **hub)
    if attached:
        use_token_adapter(model, 1)
    return model.eval()


def refuse_other_heads(adapter: str, config: CostWiseConfig, **hub: Any) -> None:
    """Adapters find heads by their number: those of other exits would go into the wrong ones without a word.

    Raises:
        ValueError: if fine-tuning noted exits beside the adapter that do not begin with those of `config`.
    """
    if _noted(adapter, **hub).get("layer_wise"):
        exits = read_config(adapter, **hub).exit_layers
        if exits[: len(config.exit_layers)] != config.exit_layers:
            raise ValueError(f"the adapter {adapter} is for the exits {exits}, but the model has {config.exit_layers}.")


def token_adapter_ratio(path: str, **hub: Any) -> int | None:
    """The ratio that an adapter makes up for, as fine-tuning noted beside it; None for any other adapter."""
    compensation = _noted(path, **hub).get("compensation") or {}
    return compensation.get("compress_ratio") if compensation.get("axis") == "token" else None


def _noted(adapter: str, **hub: Any) -> dict[str, Any]:
    """The model's configuration, as fine-tuning wrote it beside an adapter; empty where another program wrote it."""
    file = cached_file(adapter, "config.json", _raise_exceptions_for_missing_entries=False, **hub)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def token_adapter_ratios(model: CostWiseForCausalLM) -> set[int]:
    """The ratios that a model has adapters attached for."""
    return {
        ratio
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for ratio in COMPRESS_RATIOS
        if _token_adapter_name(ratio) in layer._get_available_adapters()
    }


def use_token_adapter(model: CostWiseForCausalLM, ratio: int) -> None:
    """Let the adapter that is attached for `ratio` act, alone, or none where there is none. No weight changes."""
    name = _token_adapter_name(ratio)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            present = name in layer._get_available_adapters()
            layer.enable_adapters(present)
            if present:
                layer.set_adapter(name, inference_mode=True)


def _token_adapter_name(ratio: int) -> str:
    return f"token_{ratio}"
