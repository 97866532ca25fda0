"""Order of the training data, and its check in a resumed run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

WORDS = {
    "rows": "rows of training data",
    "rows_per_step": "rows per step (per_device_train_batch_size * gradient_accumulation_steps * processes)",
    "steps_per_epoch": "steps per epoch",
    "seed": "seed",
    "data_seed": "data_seed",
}


class DataOrder(TrainerCallback, ExportableState):
    """Pass each epoch's number to the dataset, and refuse a resumed run whose steps would have other rows.

    transformers computes the epoch and the rows to skip from the number of steps. With another number of rows per step
    it would continue in another epoch, and train rows twice or never.

    Attributes:
        order: values that the order of the rows depends on, see `WORDS`. trainer_state.json of each checkpoint has it.
    """

    def __init__(self) -> None:
        self.order: dict[str, int | None] = {}

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
        return {"args": {}, "attributes": {"order": self.order}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise ValueError if the checkpoint was written with another order of rows."""
        loader = kwargs["train_dataloader"]
        passes = args.gradient_accumulation_steps
        self.order = {
            "rows": len(loader.dataset),
            "rows_per_step": args.train_batch_size * passes * args.world_size,
            "steps_per_epoch": max(1, math.ceil(len(loader) / passes)),
            "seed": args.seed,
            "data_seed": args.data_seed,
        }
        callbacks: Any = state.stateful_callbacks
        if not state.global_step or type(self).__name__ not in callbacks:
            return
        saved = callbacks[type(self).__name__]["attributes"]["order"]
        changed = [
            f"{words}: {saved.get(name)} before, {self.order[name]} now"
            for name, words in WORDS.items()
            if saved.get(name) != self.order[name]
        ]
        if changed:
            raise ValueError(
                f"the checkpoint of step {state.global_step} cannot be resumed with another order of rows. "
                f"{'; '.join(changed)}. Resume with the old values, or start a new run from the adapter "
                "(--from_peft)."
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["train_dataloader"].dataset.start_epoch(int(state.epoch or 0))


def seed_workers_apart(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Give the loader a random generator for the seeds of its worker processes.

    Otherwise PyTorch's global generator draws these seeds whenever workers start. A resumed run starts persistent
    workers once more than an uninterrupted run, so its dropout would differ.
    """
    getattr(loader, "base_dataloader", loader).generator = torch.Generator()
    return loader
