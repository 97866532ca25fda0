"""Command line of fine-tuning."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from flagembedding_matryoshka.finetune import check
from flagembedding_matryoshka.finetune.arguments import (
    MatryoshkaDataArguments,
    MatryoshkaModelArguments,
    MatryoshkaTrainingArguments,
)
from flagembedding_matryoshka.finetune.runner import MatryoshkaRunner


def build_parser() -> HfArgumentParser:
    """Return the parser of FlagEmbedding's and the reference's arguments, and of `--config`."""
    arguments: Any = (MatryoshkaModelArguments, MatryoshkaDataArguments, MatryoshkaTrainingArguments)
    parser = HfArgumentParser(arguments)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        default=argparse.SUPPRESS,
        help="YAML file with arguments by name. An argument on the command line replaces that of the file.",
    )
    return parser


def read_config(words: Sequence[str]) -> list[str]:
    """Replace `--config FILE.yaml` by the arguments in the file, before all others.

    Args:
        words: words of the command line.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not a YAML mapping.
    """
    if not any(word.partition("=")[0] == "--config" for word in words):
        return list(words)
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--config", type=Path)
    found, others = option.parse_known_args(words)
    try:
        values = yaml.safe_load(found.config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {found.config} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {found.config} must be a mapping of argument names to values, got {values!r:.80}.")
    arguments = []
    for name, value in values.items():
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
    return arguments + others


def main() -> None:
    """Parse the command line and fine-tune, or with the first word `check` check training data."""
    if sys.argv[1:2] == ["check"]:
        check.main(sys.argv[2:])
        return
    model_args, data_args, training_args = build_parser().parse_args_into_dataclasses(read_config(sys.argv[1:]))
    MatryoshkaRunner(model_args=model_args, data_args=data_args, training_args=training_args).run()


if __name__ == "__main__":
    main()
