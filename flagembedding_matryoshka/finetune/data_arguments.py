"""What the command line says of the data, checked where it enters."""

# No `from __future__ import annotations`: HfArgumentParser reads the types of the fields.

from dataclasses import dataclass, field

from FlagEmbedding.abc.finetune.reranker import AbsRerankerDataArguments

from flagembedding_matryoshka.finetune.data import RANDOM_MARGIN
from flagembedding_matryoshka.finetune.rows import training_files


@dataclass
class MatryoshkaDataArguments(AbsRerankerDataArguments):
    """The training data and how a pair becomes a sequence.

    Raises:
        FileNotFoundError: if a file or directory is not there.
        ValueError: if no training data is named, or a file is not JSON Lines by its name.
    """

    query_instruction_for_rerank: str | None = field(
        default=None, metadata={"help": "Text in front of a query (default: the template's)."}
    )
    passage_instruction_for_rerank: str | None = field(
        default=None, metadata={"help": "Text in front of a passage (default: the template's)."}
    )
    sep_token: str | None = field(
        default=None, metadata={"help": "Text behind the query and behind the passage (default: the template's)."}
    )
    query_max_len: int = field(
        default=32,
        metadata={
            "help": "Tokens of a query. With the templates cost_wise, gemma2-lightweight, minicpm and bge-gemma, its "
            "instruction counts too; with any other the template comes on top."
        },
    )
    passage_max_len: int = field(
        default=192,
        metadata={
            "help": "Tokens of a passage. With the templates cost_wise, gemma2-lightweight, minicpm and bge-gemma, the "
            "whole sequence is cut to query_max_len + passage_max_len; with any other the template comes on top."
        },
    )

    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "FlagEmbedding's argument; here no batch is padded, to no multiple either."}
    )
    eval_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files or directories as in train_data, whose lists every exit ranks at each checkpoint: MRR@10 "
            "and nDCG@10 are logged, and the best checkpoint is kept."
        },
    )
    random_negatives: float = field(
        default=0.0,
        metadata={
            "help": "Share of a group's negatives that are passages of other rows of the same file, drawn anew each "
            "epoch. Without them a small model's loss can stay at chance if all mined negatives are too hard. They "
            "differ from each other, from the query and from all passages of the row. Their teacher score is the row's "
            f"lowest minus {RANDOM_MARGIN:g}. With 1, neg may be empty."
        },
    )
    skip_bad_lines: bool = field(
        default=False, metadata={"help": "Leave out lines that are wrong, and say how many, instead of stopping."}
    )

    def __post_init__(self) -> None:
        if not self.train_data:
            raise ValueError("train_data is empty: name one or more JSON Lines files, or directories of them.")
        paths: str | list[str] = self.train_data
        self.train_data: list[str] = training_files([paths] if isinstance(paths, str) else paths)
        if self.eval_data is not None:
            self.eval_data = training_files(self.eval_data)
        super().__post_init__()
        if self.max_len != AbsRerankerDataArguments.max_len:
            raise ValueError(f"max_len={self.max_len} cuts nothing: use query_max_len and passage_max_len.")
        if self.train_group_size < 2:
            raise ValueError(f"train_group_size is {self.train_group_size}: a positive needs at least one negative.")
        if not 0 <= self.random_negatives <= 1:
            raise ValueError(f"random_negatives is {self.random_negatives}, but is a share, from 0 to 1.")
