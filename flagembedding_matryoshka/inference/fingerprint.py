"""Fingerprints of models. Results of equal weights are stored under one fingerprint.

`model_fingerprint` reads all weights of a loaded model, merged and quantized. An evaluation stores its results under
it. `weights_of` reads the files of a checkpoint without loading them.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from flagembedding_matryoshka.checkpoints.loading import hub_options, inspect_checkpoint
from flagembedding_matryoshka.checkpoints.weights import weights_fingerprint
from flagembedding_matryoshka.inference.device import resolve_dtype
from flagembedding_matryoshka.inference.identity import model_fingerprint
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker

__all__ = ["model_fingerprint", "resolved_dtype", "weights_of"]
HUB = ("cache_dir", "token", "revision", "local_files_only")
OF_A_CHECKPOINT = ("from_raw", "start_layer", "layer_sep", "max_layer", "template", "trust_remote_code", "allow_pickle")


def weights_of(model: str, options: Mapping[str, Any]) -> str:
    """Return a fingerprint of the files of the weights that `MatryoshkaReranker(model, **options)` would load.

    Args:
        options: the constructor's arguments that were given.

    Raises:
        FileNotFoundError, ValueError: as the constructor.
    """
    hub = hub_options(**{name: options[name] for name in HUB if name in options})
    given: Any = {name: options[name] for name in OF_A_CHECKPOINT if name in options}
    adapters = options.get("peft_path") or ()
    adapters = [adapters] if isinstance(adapters, str | PathLike) else adapters
    return weights_fingerprint(inspect_checkpoint(model, **given, **hub), adapters, **hub)


def resolved_dtype(options: Mapping[str, Any]) -> str:
    """Return the dtype, such as "float32", in which `MatryoshkaReranker(model, **options)` would load weights here.

    Args:
        options: the constructor's arguments that were given.

    Raises:
        ValueError: as the constructor.
    """
    dtype = resolve_dtype(
        options.get("dtype", "auto"),
        options.get("use_fp16", False),
        options.get("use_bf16", False),
        MatryoshkaReranker.get_target_devices(options.get("devices"))[0],
        options.get("quantization"),
    )
    return str(dtype).removeprefix("torch.")
