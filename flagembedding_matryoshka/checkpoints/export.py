"""Checkpoints out: a part of a model, and what lets sentence-transformers load one."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratios
from flagembedding_matryoshka.models.backbones import causal_lm_class
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM


def export_exits(model: CostWiseForCausalLM, cutoff_layers: Sequence[int], output_dir: str) -> None:
    """Write a checkpoint with the layers up to the deepest of `cutoff_layers`, and with their heads.

    Raises:
        ValueError: if token adapters are attached, of which a checkpoint can hold one.
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
    part.save_pretrained(output_dir)
    write_sentence_transformers_files(output_dir)


def write_sentence_transformers_files(directory: str | Path) -> None:
    """Name our module beside a checkpoint, for sentence-transformers' CrossEncoder to load it with."""
    module = "flagembedding_matryoshka.cross_encoder.MatryoshkaModule"
    contents: dict[str, Any] = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": module}],
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder",
            "activation_fn": "torch.nn.modules.linear.Identity",
        },
    }
    for name, content in contents.items():
        Path(directory, name).write_text(json.dumps(content, indent=2) + "\n")
