"""What FSDP asks of the model that it shards, and what it may round."""

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


class Shardable:
    """In front of FlagEmbedding's model, as the first base: `fully_shard` changes the class of what it shards.

    Python allows that only where `__dict__` comes with a child of `object`; FlagEmbedding's has it from one of `ABC`.
    """

    model: Any

    @property
    def _no_split_modules(self) -> set[str]:
        """The classes of the parts that are gathered one after another: the decoder's layers."""
        return self.model._no_split_modules


def keep_loss_in_float32(plugin: FullyShardedDataParallelPlugin) -> None:
    """Let mixed precision round weights and states, but neither what a model gives nor the sum of gradients.

    accelerate's policy for bfloat16 has the loss in bfloat16, too: 19.2 becomes 19.25.
    """
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


@contextmanager
def whole_while_loading(args: TrainingArguments) -> Iterator[None]:
    """Let ZeRO-3 take its parts of the weights when training begins, not while they are read.

    Heads are made of rows of the vocabulary, and adapters merged into matrices: both have to be there.

    Raises:
        ValueError: if the parts would not be put together again when the model is written.
    """
    zero = args.deepspeed_plugin and args.deepspeed_plugin.hf_ds_config
    if not zero or not zero.is_zero3():
        yield
        return
    gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if not zero.is_true(gather):
        raise ValueError(f"DeepSpeed's configuration has no {gather}: true, without which no model would be written.")
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(zero)
