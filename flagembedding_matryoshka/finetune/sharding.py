"""Settings of FSDP2 and of DeepSpeed ZeRO-3: which modules are sharded, when, and in which dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from flagembedding_matryoshka.private import get_whole_modules


class Shardable:
    """First base of a model that FSDP2 shards, before FlagEmbedding's class.

    FSDP2 replaces a module's `__class__`. Python refuses that for FlagEmbedding's class, which gets its `__dict__` from
    a subclass of `ABC`. A first base that is a direct child of `object` makes it possible.
    """

    model: Any

    @property
    def _no_split_modules(self) -> set[str]:
        """Names of the module classes that are sharded and gathered one by one: the decoder's layers."""
        return get_whole_modules(self.model)


def keep_loss_in_float32(plugin: FullyShardedDataParallelPlugin) -> None:
    """Exclude a model's outputs and the reduction of gradients from FSDP2's mixed precision.

    accelerate's policy for bfloat16 rounds the loss to bfloat16, too: 19.2 becomes 19.25.
    """
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


@contextmanager
def unsharded_loading(args: TrainingArguments) -> Iterator[None]:
    """Disable ZeRO-3 while weights are loaded. It shards them when training begins.

    Heads are initialised from rows of the vocabulary and adapters are merged into matrices: both need whole weights.

    Raises:
        ValueError: if DeepSpeed's configuration does not gather the weights when the model is saved.
    """
    zero = args.deepspeed_plugin and args.deepspeed_plugin.hf_ds_config
    if not zero or not zero.is_zero3():
        yield
        return
    gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if not zero.is_true(gather):
        raise ValueError(f"DeepSpeed's configuration needs {gather}: true, so that the model can be saved.")
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(zero)
