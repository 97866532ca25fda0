"""Command line of fine-tuning."""

import sys
from typing import Any

from flagembedding_matryoshka.dataclass_parser import DataclassParser
from flagembedding_matryoshka.finetune import check
from flagembedding_matryoshka.finetune.arguments import (
    MatryoshkaDataArguments,
    MatryoshkaModelArguments,
    MatryoshkaTrainingArguments,
)
from flagembedding_matryoshka.finetune.runner import MatryoshkaRunner


def build_parser() -> DataclassParser:
    """Return the parser of FlagEmbedding's and the reference's arguments, and of `--config`."""
    arguments: Any = (MatryoshkaModelArguments, MatryoshkaDataArguments, MatryoshkaTrainingArguments)
    return DataclassParser(arguments)


def main() -> None:
    """Parse the command line and fine-tune, or with the first word `check` check training data."""
    if sys.argv[1:2] == ["check"]:
        check.main(sys.argv[2:])
        return
    model_args, data_args, training_args = build_parser().parse_args_into_dataclasses()
    MatryoshkaRunner(model_args=model_args, data_args=data_args, training_args=training_args).run()


if __name__ == "__main__":
    main()
