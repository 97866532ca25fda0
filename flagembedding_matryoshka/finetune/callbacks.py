"""Callbacks of the trainer: the order of the training data, early stopping, and the steps of the saved checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from flagembedding_matryoshka.finetune.checkpoints import checkpoint_path, is_complete

ORDER = {
    "rows": "rows of training data",
    "rows_per_step": "rows per step (per_device_train_batch_size * gradient_accumulation_steps * processes)",
    "steps_per_epoch": "steps per epoch",
    "seed": "seed",
    "data_seed": "data_seed",
}
"""Values that the order of the rows depends on, with the words for them in an error."""


class DataOrder(TrainerCallback, ExportableState):
    """Pass each epoch's number to the dataset, and refuse a resumed run whose steps would have other rows.

    transformers computes the epoch and the rows to skip from the number of steps. With another number of rows per step
    it would continue in another epoch, and train rows twice or never.

    Attributes:
        order: values of the run by the names in `ORDER`. trainer_state.json of each checkpoint has them.
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
            for name, words in ORDER.items()
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


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, for resumed runs too: a run that it has stopped trains no further step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


class SavedSteps(TrainerCallback, ExportableState):
    """Record the steps of a run's checkpoints, and refuse a run with too few checkpoints to average.

    Attributes:
        steps: steps of the checkpoints that the run has written, also before it was resumed. trainer_state.json of a
            checkpoint has the steps of earlier ones.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
        return {"args": {}, "attributes": {"steps": self.steps}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise ValueError if the run will lack a checkpoint to average, or `output_dir` has another run's."""
        callbacks: Any = state.stateful_callbacks
        if state.global_step:
            before = callbacks.get(type(self).__name__, {}).get("attributes", {}).get("steps", [])
            self.steps = [step for step in before if step < state.global_step] + [state.global_step]
        count, output_dir = args.average_last, Path(str(args.output_dir))
        if count == 1:
            return
        every = state.save_steps
        if args.save_strategy == "epoch":
            every = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)
        first = state.global_step // every * every + every
        future = {*range(first, state.max_steps + 1, every), state.max_steps}
        usable = {step for step in self.steps if is_complete(checkpoint_path(output_dir, step))} | future
        if len(usable) < count:
            raise ValueError(
                f"average_last={count}, but the run of {state.max_steps} steps has {len(usable)} checkpoints, of steps "
                f"{', '.join(map(str, sorted(usable)))}: train more steps, save more often, or average fewer."
            )
        wanted = sorted({*self.steps, *future})[-count:]
        if missing := [checkpoint_path(output_dir, step) for step in wanted if step not in usable]:
            raise ValueError(
                f"average_last={count} needs the checkpoints of steps {', '.join(map(str, wanted))}, but {output_dir} "
                f"has no complete {', '.join(path.name for path in missing)}: restore them, or average fewer."
            )
        found = {
            int(step)
            for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
            if (step := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit()
        }
        if args.save_total_limit is not None and (others := sorted(found - usable - set(self.steps))):
            raise ValueError(
                f"average_last={count} and save_total_limit={args.save_total_limit}, but {output_dir} has "
                f"checkpoints of another run, which the limit counts too: steps {', '.join(map(str, others))}. Remove "
                "them, or name another output_dir."
            )

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps = [step for step in self.steps if step != state.global_step] + [state.global_step]

    def checkpoints(self, args: Any, last_step: int) -> list[Path]:
        """Return the checkpoints to average with the final state, newest first.

        Args:
            args: the training arguments.
            last_step: step of the final state.

        Raises:
            ValueError: if a checkpoint is missing or incomplete.
        """
        output_dir, wanted = Path(str(args.output_dir)), args.average_last - 1
        steps = sorted((step for step in self.steps if step < last_step), reverse=True)[:wanted]
        paths = [path for step in steps if is_complete(path := checkpoint_path(output_dir, step))]
        if len(paths) < wanted:
            raise ValueError(
                f"average_last={args.average_last} needs {wanted} checkpoints before that of step {last_step}, but "
                f"{output_dir} has {len(paths)} complete ones of the saved steps {steps}. The final state alone is in "
                f"{checkpoint_path(output_dir, last_step)}."
            )
        return paths
