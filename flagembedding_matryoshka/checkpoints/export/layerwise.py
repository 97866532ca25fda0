"""Layer-wise checkpoints, and the files with which sentence-transformers loads them."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratios
from flagembedding_matryoshka.checkpoints.describing import EXPORT_FILE, MODULE_SETTINGS_FILE
from flagembedding_matryoshka.models.backbones import causal_lm_class
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.text.templates import Template

MERGED = "merged_model"
"""The folder in which fine-tuning writes the model with its adapters merged."""
ACTIVATIONS = {"identity": "torch.nn.modules.linear.Identity", "sigmoid": "torch.nn.modules.activation.Sigmoid"}
"""Names of activation functions in sentence-transformers."""
SENTENCE_TRANSFORMERS_FILE = "config_sentence_transformers.json"
FOLDERS = (MERGED, "onnx", "openvino")
"""Folders of a checkpoint that hold files of `WRITTEN`."""
WRITTEN = (
    # the configuration and the weights, whole or in shards
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    # adapters: a directory that holds them is loaded through their base
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    # the tokenizer
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    # one exit for other runtimes
    "model.onnx",
    "model.onnx.data",
    "openvino_model.xml",
    "openvino_model.bin",
    "openvino_config.json",
    "model-f32.gguf",
    "model-f16.gguf",
    "model-q8_0.gguf",
    # what says how the model is used
    "matryoshka_plan.json",
    "matryoshka_config.json",
    EXPORT_FILE,
    "modules.json",
    "sentence_bert_config.json",
    SENTENCE_TRANSFORMERS_FILE,
    # the last file of a checkpoint of a training run, which says that the others are complete
    "trainer_state.json",
)
"""The files that this package writes into a directory of a checkpoint, as shell patterns of their names.

A new checkpoint replaces all of them, and those in the folders `FOLDERS`. No other file of the directory is touched:
neither the checkpoints of a training run, nor a README.md, nor weights in other formats.
"""


def remove_written(directory: str | Path, kept: Collection[str] = ()) -> None:
    """Remove the files of an earlier checkpoint, before a new checkpoint is written to its directory.

    Args:
        directory: the directory, which need not exist.
        kept: names of files to keep, because they belong to the new checkpoint.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        is_written = any(fnmatchcase(path.name, pattern) for pattern in WRITTEN)
        if is_written and path.name not in kept and (path.is_file() or path.is_symlink()):
            path.unlink()
    for folder in (directory / name for name in FOLDERS):
        if folder.is_dir() and not folder.is_symlink():
            remove_written(folder)
            if not any(folder.iterdir()):
                folder.rmdir()


def export_exits(
    model: CostWiseForCausalLM,
    cutoff_layers: Sequence[int],
    output_dir: str,
    template: Template | None = None,
    activation: str = "identity",
) -> None:
    """Write a checkpoint with the layers up to the deepest of `cutoff_layers`, and with their heads.

    It replaces a checkpoint in the directory, see `WRITTEN`.

    Args:
        template: template of the new checkpoint; None is the model's.
        activation: as in `write_sentence_transformers_files`.

    Raises:
        ValueError: if token adapters are attached, because a checkpoint holds at most one.
    """
    if token_adapters := token_adapter_ratios(model):
        raise ValueError(
            f"token adapters for the ratios {sorted(token_adapters)} are attached: export the model without "
            "them, and give them to the exported one as peft_path."
        )
    config = copy.deepcopy(model.config)
    config.exits = sorted(set(cutoff_layers))
    config.cut(config.exits[-1])
    config.raw_peft, config.compensation = [], None
    if template is not None:
        config.template = template.to_json()
    heads = {
        f"lm_head.{old}.": f"lm_head.{config.exit_layers.index(layer)}."
        for old, layer in enumerate(model.config.exit_layers)
        if layer in config.exit_layers
    }
    with torch.device("meta"):
        part = causal_lm_class(config)(config)
    wanted, weights = part.state_dict().keys(), {}
    for name, value in model.state_dict().items():
        if name.startswith("lm_head."):
            prefix = next((old for old in heads if name.startswith(old)), None)
            if prefix is not None:
                weights[heads[prefix] + name.removeprefix(prefix)] = value
        elif name in wanted:
            weights[name] = value
    part.load_state_dict(weights, assign=True)
    remove_written(output_dir)
    part.save_pretrained(output_dir)
    write_sentence_transformers_files(output_dir, activation)


def write_sentence_transformers_files(directory: str | Path, activation: str = "identity") -> None:
    """Write the files by which sentence-transformers' CrossEncoder loads a checkpoint with this package's module.

    Args:
        activation: the function that CrossEncoder applies to raw scores, see
            [`Description`][flagembedding_matryoshka.checkpoints.describing.Description].
    """
    module = "flagembedding_matryoshka.cross_encoder.MatryoshkaModule"
    contents: dict[str, Any] = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": module}],
        SENTENCE_TRANSFORMERS_FILE: {
            "model_type": "CrossEncoder",
            "activation_fn": ACTIVATIONS.get(activation, activation),
        },
    }
    for name, content in contents.items():
        Path(directory, name).write_text(json.dumps(content, indent=2) + "\n")


def write_lengths(directory: str | Path, query_max_length: int | None, max_length: int) -> None:
    """Write the lengths that texts are truncated to, in the form of `MatryoshkaModule`.

    CrossEncoder and `MatryoshkaReranker` read them.
    """
    lengths = {"query_max_length": query_max_length, "max_length": max_length}
    Path(directory, MODULE_SETTINGS_FILE).write_text(json.dumps(lengths, indent=2) + "\n")
