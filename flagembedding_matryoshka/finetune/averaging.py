"""The mean of the weights of a run's last states (stochastic weight averaging, Izmailov et al., arXiv 1803.05407)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from flagembedding_matryoshka.finetune.checkpoints import is_complete


def refuse_impossible_average(args: Any) -> None:
    """Raise ValueError if the arguments contradict `average_last`.

    Args:
        args: `MatryoshkaTrainingArguments`, with evaluated checkpoints after `rank_checkpoints`.
    """
    count = args.average_last
    if count < 1:
        raise ValueError(f"average_last={count}, but must be at least 1; 1 is the final state alone.")
    if count == 1:
        return
    if args.save_strategy not in ("steps", "epoch"):
        raise ValueError(f"average_last={count} needs save_strategy steps or epoch, got {args.save_strategy.value}.")
    if args.load_best_model_at_end:
        raise ValueError(f"average_last={count} contradicts load_best_model_at_end=True: choose one of them.")
    kept = count + (args.metric_for_best_model is not None)
    if args.save_total_limit is not None and args.save_total_limit < kept:
        best = "" if kept == count else " and the best one"
        raise ValueError(
            f"average_last={count}, but save_total_limit={args.save_total_limit} deletes checkpoints that it needs: "
            f"keep at least {kept}, the last {count}{best}."
        )


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
        usable = {step for step in self.steps if is_complete(_checkpoint(output_dir, step))} | future
        if len(usable) < count:
            raise ValueError(
                f"average_last={count}, but the run of {state.max_steps} steps has {len(usable)} checkpoints, of steps "
                f"{', '.join(map(str, sorted(usable)))}: train more steps, save more often, or average fewer."
            )
        wanted = sorted({*self.steps, *future})[-count:]
        if missing := [_checkpoint(output_dir, step) for step in wanted if step not in usable]:
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
        paths = [path for step in steps if is_complete(path := _checkpoint(output_dir, step))]
        if len(paths) < wanted:
            raise ValueError(
                f"average_last={args.average_last} needs {wanted} checkpoints before that of step {last_step}, but "
                f"{output_dir} has {len(paths)} complete ones of the saved steps {steps}. The final state alone is in "
                f"{_checkpoint(output_dir, last_step)}."
            )
        return paths


def average_weights(
    parameters: Mapping[str, nn.Parameter], checkpoints: Sequence[Path], load: Callable[[str], None]
) -> None:
    """Set the parameters to the float32 mean of their values and their values in the checkpoints.

    Args:
        parameters: trained parameters, by name.
        checkpoints: directories of checkpoints.
        load: sets the parameters to the values in a checkpoint.
    """
    sums = {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in parameters.items()}
    for checkpoint in checkpoints:
        load(str(checkpoint))
        for name, parameter in parameters.items():
            sums[name] += parameter.detach().to("cpu", torch.float32)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(sums[name] / (1 + len(checkpoints)))


def _checkpoint(output_dir: Path, step: int) -> Path:
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
