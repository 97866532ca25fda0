"""LoRA adapters: what they note of themselves, and which of them act."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils import CONFIG_NAME, cached_file

from flagembedding_matryoshka.checkpoints.gguf import resolve
from flagembedding_matryoshka.checkpoints.shipped import checked, locate
from flagembedding_matryoshka.models.backbones import read_config
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import COMPRESS_RATIOS


def base_of(adapter: str, **hub: Any) -> tuple[str, str | None]:
    """What an adapter notes as its base, and the base's revision if it notes one.

    Raises:
        FileNotFoundError: if that is a path which is no longer there.
        ValueError: if the adapter notes no base.
    """
    noted = PeftConfig.from_pretrained(adapter, **hub)
    base = noted.base_model_name_or_path
    if not base:
        raise ValueError(
            f"the adapter_config.json of {adapter} has base_model_name_or_path={base!r}. Load the base that it was "
            f"trained on, with peft_path={adapter!r}."
        )
    try:
        return checked(base), noted.revision
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the adapter {adapter} was trained on {base}, which is not there. If the base has moved, load it from "
            f"where it is, with the adapter on top: its path as the model, and peft_path={adapter!r}."
        ) from error


def place_of_config(adapter: str, base: str, base_revision: str | None, **hub: Any) -> tuple[str, dict[str, Any]]:
    """Where the configuration of a base with its adapter lies.

    Fine-tuning in this package writes a config.json into the adapter's directory. Other programs, as FlagEmbedding's
    runners, write none; then it is the base's.

    Args:
        adapter: the adapter's directory or name.
        base, base_revision: as `base_of` returns them.
        hub: as of `hub_options`; `revision` is that of the adapter.

    Returns:
        the directory or name, and the options of `hub` for it.

    Raises:
        FileNotFoundError: if neither the adapter nor the base has a configuration that can be read.
    """
    if _noted(adapter, **hub):
        return adapter, dict(hub)
    place = resolve(locate(base), hub.get("cache_dir"))
    of_base = {name: value for name, value in {**hub, "revision": base_revision}.items() if value is not None}
    try:
        found = cached_file(place, CONFIG_NAME, **of_base)
    except OSError as error:
        raise _no_base(adapter, base, error) from error
    if found is None:
        raise _no_base(adapter, base)
    return place, of_base


def _no_base(adapter: str, base: str, error: OSError | None = None) -> FileNotFoundError:
    return FileNotFoundError(
        f"the adapter {adapter} was trained on {base}, which is neither a directory here with a config.json nor a "
        f"model that could be read from the hub. Load the base from where it is, with peft_path={adapter!r}."
        + (f" ({error})" if error else "")
    )


def fetched(adapter: str, **hub: Any) -> str:
    """The directory of an adapter: peft itself asks the hub for weights, even of those that `local_files_only` forbids.

    Raises:
        FileNotFoundError: if it has no weights.
    """
    return str(adapter_file(adapter, **hub).parent)


def adapter_file(adapter: str, **hub: Any) -> Path:
    """Where the weights of an adapter lie.

    Raises:
        FileNotFoundError: if it has none.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        file = cached_file(adapter, name, _raise_exceptions_for_missing_entries=False, **hub)
        if file is not None:
            return Path(file)
    raise FileNotFoundError(
        f"the adapter {adapter} has no weights: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}."
    )


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
    file = cached_file(adapter, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def token_adapter_ratios(model: CostWiseForCausalLM) -> set[int]:
    """The ratios that a model has adapters attached for."""
    return {
        ratio
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for ratio in COMPRESS_RATIOS
        if token_adapter_name(ratio) in layer._get_available_adapters()
    }


def use_token_adapter(model: CostWiseForCausalLM, ratio: int) -> None:
    """Let the adapter that is attached for `ratio` act, alone, or none where there is none. No weight changes."""
    name = token_adapter_name(ratio)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            present = name in layer._get_available_adapters()
            layer.enable_adapters(present)
            if present:
                layer.set_adapter(name, inference_mode=True)


def token_adapter_name(ratio: int) -> str:
    return f"token_{ratio}"
