"""What can be said on the command line, checked where it enters."""

# No `from __future__ import annotations`: HfArgumentParser reads the types of the fields.

from dataclasses import dataclass, field
from typing import Literal

from FlagEmbedding.abc.finetune.reranker import (
    AbsRerankerDataArguments,
    AbsRerankerModelArguments,
    AbsRerankerTrainingArguments,
)

from flagembedding_matryoshka.configuration import COMPRESS_RATIOS
from flagembedding_matryoshka.finetune.data import training_files
from flagembedding_matryoshka.losses import TRAIN_METHODS

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "linear_head"]


@dataclass
class MatryoshkaModelArguments(AbsRerankerModelArguments):
    """The model, its exits and how it is adapted.

    Raises:
        ValueError: on values that this model has no use for; they are refused rather than ignored.
    """

    model_type: str = field(
        default="decoder",
        metadata={
            "help": "decoder takes any checkpoint; from_raw_model or from_finetuned_model insists on one of a kind"
        },
    )
    layer_wise: bool = field(default=True, metadata={"help": "Train a scoring head per exit; the only way here."})
    start_layer: int = field(default=4, metadata={"help": "The shallowest exit of a raw model, in decoder layers."})
    layer_sep: int = field(default=1, metadata={"help": "Decoder layers between neighbouring exits of a raw model."})
    use_lora: bool = field(default=True, metadata={"help": "Train low-rank adapters; False trains all weights."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the adapters, divided by their rank."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout in front of the adapters."})
    target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS),
        metadata={"help": "Modules that get an adapter; linear_head is the scoring heads."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full and save whole."}
    )
    from_peft: str | None = field(default=None, metadata={"help": "An adapter to go on training."})
    raw_peft: list[str] | None = field(
        default=None, metadata={"help": "Adapters to merge into the model first, in order."}
    )
    save_merged_lora_model: bool = field(
        default=False, metadata={"help": "Also write output_dir/merged_model, adapters merged."}
    )
    use_flash_attn: bool = field(
        default=False, metadata={"help": "Refused: attention is over packed sequences already."}
    )
    padding_side: Literal["right"] = field(default="right", metadata={"help": "Side that batches are padded on."})
    loss_type: Literal["only logits"] = field(
        default="only logits", metadata={"help": "Distillation is on scores alone."}
    )

    def __post_init__(self) -> None:
        if self.model_type not in ("decoder", "from_raw_model", "from_finetuned_model"):
            raise ValueError(f"model_type is {self.model_type!r}: use decoder, from_raw_model or from_finetuned_model.")
        if not self.layer_wise:
            raise ValueError("layer_wise=False: FlagEmbedding's own decoder-only fine-tuning trains a single head.")
        if self.padding_side != "right":
            raise ValueError(f"padding_side is {self.padding_side!r}: batches are padded on the right.")
        if self.loss_type != "only logits":
            raise ValueError(f"loss_type is {self.loss_type!r}: 'only logits' is the only one.")
        if self.use_flash_attn:
            raise ValueError("use_flash_attn=True: a packed batch brings its own attention. Leave the argument out.")
        if self.config_name is not None:
            raise ValueError(f"config_name={self.config_name!r}: the configuration comes with the checkpoint.")
        if not self.use_lora and (self.from_peft is not None or self.save_merged_lora_model):
            raise ValueError("use_lora=False contradicts from_peft and save_merged_lora_model: there is no adapter.")


@dataclass
class MatryoshkaDataArguments(AbsRerankerDataArguments):
    """The training data and how a pair becomes a sequence.

    Raises:
        FileNotFoundError: if a file or directory is not there.
        ValueError: if no training data is named, or a file is not JSON Lines by its name.
    """

    query_instruction_for_rerank: str | None = field(default="A: ", metadata={"help": "Text in front of a query."})
    passage_instruction_for_rerank: str | None = field(default="B: ", metadata={"help": "Text in front of a passage."})
    passage_max_len: int = field(
        default=192,
        metadata={"help": "Tokens of a passage; the whole sequence is cut to query_max_len + passage_max_len."},
    )

    def __post_init__(self) -> None:
        if not self.train_data:
            raise ValueError("train_data is empty: name one or more JSON Lines files, or directories of them.")
        paths: str | list[str] = self.train_data
        self.train_data: list[str] = training_files([paths] if isinstance(paths, str) else paths)
        super().__post_init__()
        if self.max_len != AbsRerankerDataArguments.max_len:
            raise ValueError(f"max_len={self.max_len} cuts nothing: use query_max_len and passage_max_len.")
        if self.train_group_size < 2:
            raise ValueError(f"train_group_size is {self.train_group_size}: a positive needs at least one negative.")


@dataclass
class MatryoshkaTrainingArguments(AbsRerankerTrainingArguments):
    """The method, the sub-networks to train, and all of transformers' `TrainingArguments`.

    Raises:
        ValueError: on a method or ratio that does not exist, and on ratios that contradict the rest.
    """

    train_method: str = field(
        default="distill_fix_layer_teacher",
        metadata={"help": "What is learnt beside the label: " + ", ".join(TRAIN_METHODS)},
    )
    compress_layers: list[int] = field(
        default_factory=list,
        metadata={"help": "Layers after which the passage may be compressed; each is on in half of the steps."},
    )
    compress_ratios: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Ratios to draw from, one each step; 1 is off."}
    )
    finetune_type: Literal["layer", "token"] | None = field(
        default=None,
        metadata={
            "help": "Which adapter of the second stage this is: layer trains without compression, token with it. "
            "It checks compress_ratios and compress_layers, which alone decide what is trained."
        },
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Share of the steps in which the learning rate rises; or give warmup_steps."}
    )

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            if self.warmup_steps or not 0 <= self.warmup_ratio < 1:
                raise ValueError(f"warmup_ratio={self.warmup_ratio} must be in [0, 1), and without warmup_steps.")
            # transformers 5 reads a fraction as the ratio that had an argument of its own before
            self.warmup_steps: float = self.warmup_ratio
        super().__post_init__()
        if self.train_method not in TRAIN_METHODS:
            raise ValueError(f"train_method is {self.train_method!r}, but must be one of {list(TRAIN_METHODS)}.")
        unknown = [ratio for ratio in self.compress_ratios if ratio not in COMPRESS_RATIOS]
        if unknown or not self.compress_ratios:
            raise ValueError(f"compress_ratios {self.compress_ratios} must be drawn from {list(COMPRESS_RATIOS)}.")
        if self.sub_batch_size is not None:
            raise ValueError(f"sub_batch_size={self.sub_batch_size}: use gradient_accumulation_steps instead.")
        compresses = bool(self.compress_layers) and max(self.compress_ratios) > 1
        if 1 not in self.compress_ratios and not compresses:
            raise ValueError(f"compress_ratios {self.compress_ratios} need compress_layers that say where to compress.")
        if self.finetune_type not in (None, "layer", "token"):
            raise ValueError(f"finetune_type is {self.finetune_type!r}, but must be layer or token, or left out.")
        if self.finetune_type == "layer" and max(self.compress_ratios) > 1:
            raise ValueError(f"finetune_type=layer trains without compression, got {self.compress_ratios}; use 1.")
        if self.finetune_type == "token" and not compresses:
            raise ValueError(
                "finetune_type=token trains with compression, but none is asked for by "
                f"compress_ratios {self.compress_ratios} and compress_layers {self.compress_layers}."
            )
