"""Trainings by the fine-tuning command. Each one is run once."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.finetune.sources import source_files

logger = logging.getLogger(__name__)

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
FINETUNE = [sys.executable, *LAUNCHER, "-m", "flagembedding_matryoshka.finetune"]
DEFAULTS = ["--report_to", "none", "--logging_steps", "10", "--save_steps", "50", "--save_total_limit", "1"]
SET_HERE = (
    *("--model_name_or_path", "--train_data", "--output_dir", "--cache_path", "--max_steps", "--seed"),
    *("--train_method", "--knowledge_distillation", "--finetune_type", "--resume_from_checkpoint"),
)
RECORD = "ablation.json"


def train(options: argparse.Namespace, model: str, output_dir: Path, seed: int, arguments: Sequence[str] = ()) -> Path:
    """Fine-tune `model` into `output_dir`, or resume. A finished training is not repeated.

    Args:
        options: `train_data`, `steps`, and `training_arguments` for the command.
        arguments: further arguments of this training.

    Raises:
        ValueError: if `output_dir` holds another training.
        subprocess.CalledProcessError: if the training fails.
    """
    files = source_files(options.train_data)
    asked: dict[str, Any] = {
        "model": str(Path(model).resolve() if Path(model).exists() else model),
        "data": {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files},
        "steps": options.steps,
        "seed": seed,
        "arguments": [*DEFAULTS, *options.training_arguments, *arguments],
    }
    record = output_dir / RECORD
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"asked": asked, "finished": False}
    if before["asked"] != asked:
        changed = [name for name, value in asked.items() if before["asked"].get(name) != value]
        raise ValueError(
            f"{output_dir} holds a training with other {', '.join(changed)}: it was {before['asked']}, and {asked} is "
            "asked for. Name another --work, or delete that directory."
        )
    if before["finished"]:
        logger.info("%s is trained already", output_dir)
        return output_dir
    write_text(record, _as_json(asked, finished=False))
    command = [
        *(*FINETUNE, *asked["arguments"]),
        *("--model_name_or_path", model, "--train_data", *files, "--output_dir", str(output_dir)),
        *("--cache_path", str(options.work / "cache"), "--max_steps", str(options.steps), "--seed", str(seed)),
        "--resume_from_checkpoint",
    ]
    logger.info("Training %s", output_dir)
    subprocess.run(command, check=True)
    write_text(record, _as_json(asked, finished=True))
    return output_dir


def _as_json(asked: dict[str, Any], finished: bool) -> str:
    return json.dumps({"asked": asked, "finished": finished}, indent=1, ensure_ascii=False) + "\n"


def about_training(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Return the conditions of the trainings, for a report."""
    return {
        "trained from": Path(model).name,
        "training files": [Path(path).name for path in source_files(options.train_data)],
        "steps": options.steps,
        "seeds": options.seeds,
        "arguments of fine-tuning": " ".join([*DEFAULTS, *options.training_arguments]),
    }
