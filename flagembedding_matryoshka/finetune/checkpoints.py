"""Checkpoints of a run: which ones are complete, which one is resumed, and the mean of their weights."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""File in output_dir that is locked while a run trains."""


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold the lock of a directory, which the system releases if the process is killed.

    Raises:
        ValueError: if another run holds it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run writes to output_dir={output_dir}: it holds {path}. Wait for it, end it, or name another "
                "output_dir."
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end. The trainer's state is the last file that is written."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def is_resumable(checkpoint: Path) -> bool:
    """Return whether a checkpoint is complete and has more than weights.

    With `save_only_model` there is no optimizer, no scheduler and no state of the random generators. transformers would
    start them anew without an error. The random states are files of this name with FSDP and DeepSpeed, too.
    """
    return is_complete(checkpoint) and any(checkpoint.glob("rng_state*.pth"))


def newest_resumable(output_dir: Path) -> Path | None:
    """Return the resumable checkpoint of the latest step in `output_dir`, None without one.

    A warning names later checkpoints that have weights only.
    """
    complete = {
        int(step): path
        for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit() and is_complete(path)
    }
    newest = max((step for step, path in complete.items() if is_resumable(path)), default=None)
    if weights_only := [complete[step].name for step in sorted(complete) if newest is None or step > newest]:
        logger.warning(
            "%s: %s were written with save_only_model=True and cannot be resumed.", output_dir, ", ".join(weights_only)
        )
    return None if newest is None else complete[newest]


def find_checkpoint(resume_from: str | None, output_dir: Path) -> str | None:
    """Return the checkpoint of `--resume_from_checkpoint`, None for a new run.

    Args:
        resume_from: a checkpoint's path; "True" or "last" is the newest complete one in `output_dir`, if there is one;
            "False" or None is none.
        output_dir: output directory of the run.

    Raises:
        ValueError: if the named checkpoint is not complete, or has weights only.
    """
    if resume_from is None or resume_from.lower() == "false":
        return None
    if resume_from.lower() in ("true", "last"):
        newest = newest_resumable(output_dir)
        return None if newest is None else str(newest)
    if not is_complete(Path(resume_from)):
        newest = newest_resumable(Path(resume_from).parent)
        raise ValueError(
            f"{resume_from} is not a complete checkpoint: its {TRAINER_STATE_NAME}, which is written last, is missing "
            f"or truncated. The newest complete checkpoint in {Path(resume_from).parent}: {newest}."
        )
    if not is_resumable(Path(resume_from)):
        raise ValueError(
            f"{resume_from} was written with save_only_model=True: it has no optimizer and no random states to resume. "
            "Start a new run from its weights (--from_peft, or --model_name_or_path with use_lora=False)."
        )
    return resume_from


def refuse_impossible_average(args: Any) -> None:
    """Raise ValueError if the arguments contradict `average_last`.

    Args:
        args: `MatryoshkaTrainingArguments`, after `evaluate_checkpoints` if there is `eval_data`.
    """
    count = args.average_last
    if count < 1:
        raise ValueError(f"average_last={count}, but must be at least 1, which is the final state without averaging.")
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


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
