"""One side, and the steps it takes."""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch
from accelerate.utils import send_to_device
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import synchronize
from benchmarks.training.jobs import Job, make_groups
from benchmarks.training.sides import COMPARISONS
from flagembedding_matryoshka import Setting

LEARNING_RATE = 2e-4


class Learner:
    """One side, ready to take steps.

    Attributes:
        operations: of floating point, in a pass under a setting, as they are done: with padding, and twice what
            checkpointing does twice. Attention in a fused kernel of a CPU is not counted.
    """

    def __init__(self, job: Job, side: str) -> None:
        self.job = job
        parts = COMPARISONS[job.compared][side]
        self.is_ours = side == "ours"
        self.batch = send_to_device(parts.collate(make_groups(job)), torch.device(job.device))
        self.model = parts.build(job).train()
        if job.checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.enable_input_require_grads()
        self.weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.operations: dict[Setting, int] = {}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=LEARNING_RATE)

    def learn(self, setting: Setting, counted: bool = False) -> float:
        """Forward and backward; the loss. Where `counted`, `operations` is told."""
        self.optimizer.zero_grad()
        mixed = self.job.dtype == torch.bfloat16
        with ExitStack() as stack:
            if mixed and self.is_ours:
                stack.enter_context(disable_input_dtype_casting(self.model))  # as our trainer does
            counter = stack.enter_context(FlopCounterMode(display=False)) if counted else None
            with torch.autocast(torch.device(self.job.device).type, torch.bfloat16, enabled=mixed):
                loss = self.model(**self.batch, setting=setting).loss
            loss.backward()
        if counter is not None:
            self.operations[setting] = counter.get_total_flops()
        return loss.item()

    def gradient_norm(self) -> float:
        return float(nn.utils.get_total_norm([weight.grad for weight in self.weights.values()]))

    def step(self, setting: Setting) -> float:
        """Seconds that a whole training step takes."""
        synchronize(self.job.device)
        start = time.perf_counter()
        self.learn(setting)
        self.optimizer.step()
        synchronize(self.job.device)
        return time.perf_counter() - start
