"""One side, and the steps it takes."""

from __future__ import annotations

import time

import torch
from torch import nn

from benchmarks.measuring import synchronize
from benchmarks.training.jobs import Job, make_batch
from benchmarks.training.sides import SIDES
from flagembedding_matryoshka import Setting

LEARNING_RATE = 2e-4


class Learner:
    """One side, ready to take steps."""

    def __init__(self, job: Job, side: str) -> None:
        self.job = job
        self.batch = make_batch(job)
        self.model = SIDES[side](job).train()
        if job.checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.enable_input_require_grads()
        self.weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=LEARNING_RATE)

    def learn(self, setting: Setting) -> float:
        """Forward and backward; the loss."""
        self.optimizer.zero_grad()
        mixed = self.job.dtype == torch.bfloat16
        with torch.autocast(torch.device(self.job.device).type, torch.bfloat16, enabled=mixed):
            loss = self.model(**self.batch, setting=setting).loss
        loss.backward()
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
