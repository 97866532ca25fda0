"""Which checkpoint a run can be resumed from."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def is_complete(checkpoint: Path) -> bool:
    """Whether all of it was written: the trainer's state is, by every process, its last file."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def newest_complete(output_dir: Path) -> Path | None:
    """The checkpoint of the latest step in `output_dir` that was written to its end, None without one."""
    found = {
        int(step): path
        for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit() and is_complete(path)
    }
    return found[max(found)] if found else None


def resolve(resume_from: str | None, output_dir: Path) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        resume_from: a checkpoint's path; "True" or "last" is the newest complete one, if there is one; "False" or None
            is none.

    Raises:
        ValueError: if the checkpoint named was not written to its end.
    """
    if resume_from is None or resume_from.lower() == "false":
        return None
    if resume_from.lower() in ("true", "last"):
        newest = newest_complete(output_dir)
        return None if newest is None else str(newest)
    if not is_complete(Path(resume_from)):
        newest = newest_complete(Path(resume_from).parent)
        raise ValueError(
            f"{resume_from} is no complete checkpoint: its {TRAINER_STATE_NAME}, which is written last, is missing or "
            f"cut off. The newest complete one beside it: {newest}."
        )
    return resume_from
