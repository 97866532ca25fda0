"""What can be said on the command line, checked where it enters."""

# No `from __future__ import annotations`: HfArgumentParser reads the types of the fields.

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from FlagEmbedding.abc.finetune.reranker import (
    AbsRerankerDataArguments,
    AbsRerankerModelArguments,
    AbsRerankerTrainingArguments,
)

from flagembedding_matryoshka.finetune.data import RANDOM_MARGIN
from flagembedding_matryoshka.finetune.evaluation import rank_checkpoints
from flagembedding_matryoshka.finetune.losses import DISTILL_LOSSES, TRAIN_METHODS, DistillLoss, TrainMethodName
from flagembedding_matryoshka.finetune.rows import training_files
from flagembedding_matryoshka.setting import COMPRESS_RATIOS


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
    template: str | None = field(
        default=None,
        metadata={
            "help": "What stands around query and passage, by name or as a JSON file (default: what the model was "
            "trained with, of a raw one that of the published models)."
        },
    )
    layer_wise: bool = field(default=True, metadata={"help": "Train a scoring head per exit; the only way here."})
    start_layer: int | None = field(
        default=None, metadata={"help": "The shallowest exit of a raw model, in decoder layers (default: 4)."}
    )
    layer_sep: int | None = field(
        default=None, metadata={"help": "Decoder layers between neighbouring exits of a raw model (default: 1)."}
    )
    exits: list[int] | None = field(
        default=None,
        metadata={
            "help": "The exits of a raw model, one by one, where they are not evenly spaced; layers above the last of "
            "them are not loaded."
        },
    )
    max_layer: int | None = field(
        default=None, metadata={"help": "Layers above this one are neither loaded nor trained."}
    )
    head_scale: float = field(
        default=0.1,
        metadata={
            "help": "The scoring heads of a raw model start as the vocabulary row of Yes times this. 1, as in the "
            "paper, starts with scores so large that the first loss lies above that of chance."
        },
    )
    use_lora: bool = field(default=True, metadata={"help": "Train low-rank adapters; False trains all weights."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the adapters, divided by their rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get an adapter (default: all linear ones of the decoder's layers, and linear_head, "
            "the scoring heads)."
        },
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
        default=False,
        metadata={
            "help": "Insist on the FlashAttention kernel, PyTorch's own, which is taken by itself wherever it runs: "
            "on a GPU, with --bf16 or --fp16."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Hold the frozen weights in 4 bits (NF4) while adapters learn (QLoRA); needs bitsandbytes."},
    )
    head_multi: bool = field(
        default=True, metadata={"help": "FlagEmbedding's layer-wise argument: a head per exit, the only way here."}
    )
    head_type: Literal["simple"] = field(
        default="simple", metadata={"help": "FlagEmbedding's layer-wise argument: a head is one linear map."}
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
        if not self.head_multi:
            raise ValueError("head_multi=False: every exit has a head of its own.")
        if self.head_type != "simple":
            raise ValueError(f"head_type is {self.head_type!r}: 'simple', one linear map, is the only one.")
        if self.load_in_4bit and not self.use_lora:
            raise ValueError("load_in_4bit=True contradicts use_lora=False: weights in 4 bits cannot learn.")
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise ImportError("load_in_4bit=True needs the package bitsandbytes: pip install bitsandbytes")
        if self.config_name is not None:
            raise ValueError(f"config_name={self.config_name!r}: the configuration comes with the checkpoint.")
        if not self.head_scale > 0:
            raise ValueError(f"head_scale is {self.head_scale}, but must be above 0: a head of zeros teaches no layer.")
        if not self.use_lora and (self.from_peft is not None or self.save_merged_lora_model):
            raise ValueError("use_lora=False contradicts from_peft and save_merged_lora_model: there is no adapter.")


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
    passage_max_len: int = field(
        default=192,
        metadata={"help": "Tokens of a passage; the whole sequence is cut to query_max_len + passage_max_len."},
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
            "epoch: where all that were mined are too hard, a small model's loss stays at chance without them. A "
            f"teacher's score for them is {RANDOM_MARGIN:g} below the lowest of the row."
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


@dataclass
class MatryoshkaTrainingArguments(AbsRerankerTrainingArguments):
    """The method, the sub-networks to train, and all of transformers' `TrainingArguments`.

    Raises:
        ValueError: on a method or ratio that does not exist, and on ratios that contradict the rest.
    """

    # What is None here depends on finetune_type and has its value behind __post_init__.
    train_method: TrainMethodName = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "Who teaches an exit beside the label: the next deeper exit (last_layer), the deepest "
            "(final_layer), every 8th (fix_layer), the data's scores (teacher). Default: distill_fix_layer_teacher, "
            "with finetune_type normal."
        },
    )
    distill_loss: DistillLoss = field(
        default="ce",
        metadata={
            "help": "How scores are compared with a teacher's: shares in the group (ce, kl) or raw (mse, margin_mse)."
        },
    )
    exit_weights: list[float] | None = field(
        default=None,
        metadata={"help": "What each exit's loss counts, from the shallowest to the deepest. Default: 1 for each."},
    )
    learning_rate: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default: 2e-4, with finetune_type 2e-5, as in the paper."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint to go on from; without a value the newest complete one in output_dir, if any.",
            "nargs": "?",
            "const": "last",
        },
    )
    overwrite_output_dir: bool = field(
        default=True, metadata={"help": "False refuses an output_dir that is not empty, unless the run is resumed."}
    )
    compress_layers: list[int] = field(
        default_factory=list,
        metadata={"help": "Layers after which the passage may be compressed; each is on in half of the steps."},
    )
    compress_ratios: list[int] = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "Ratios to draw from, one each step; 1 is off. Default: 1 2 4 8, with finetune_type layer 1, "
            "with finetune_type token 2."
        },
    )
    finetune_type: Literal["layer", "token"] | None = field(
        default=None,
        metadata={
            "help": "Which adapter of the second stage this is: layer learns to make up for missing layers, at full "
            "width; token for compression, at one ratio. The adapter notes it, and scoring acts on it."
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
        if self.deepspeed is not None and find_spec("deepspeed") is None:
            raise ImportError(f"deepspeed={self.deepspeed} needs the package of that name: pip install deepspeed")
        if self.load_best_model_at_end:
            rank_checkpoints(self)
        compensates = self.finetune_type is not None
        if self.train_method is None:
            self.train_method = "normal" if compensates else "distill_fix_layer_teacher"
        if self.learning_rate is None:
            self.learning_rate = 2e-5 if compensates else 2e-4
        if self.compress_ratios is None:
            self.compress_ratios = {None: list(COMPRESS_RATIOS), "layer": [1], "token": [2]}.get(self.finetune_type, [])
        super().__post_init__()
        if self.train_method not in TRAIN_METHODS:
            raise ValueError(f"train_method is {self.train_method!r}, but must be one of {list(TRAIN_METHODS)}.")
        if self.distill_loss not in DISTILL_LOSSES:
            raise ValueError(f"distill_loss is {self.distill_loss!r}, but must be one of {list(DISTILL_LOSSES)}.")
        if self.finetune_type not in (None, "layer", "token"):
            raise ValueError(f"finetune_type is {self.finetune_type!r}, but must be layer or token, or left out.")
        if self.exit_weights is not None and not all(weight >= 0 for weight in self.exit_weights):
            raise ValueError(f"exit_weights {self.exit_weights} must not be negative.")
        unknown = [ratio for ratio in self.compress_ratios if ratio not in COMPRESS_RATIOS]
        if unknown or not self.compress_ratios:
            raise ValueError(f"compress_ratios {self.compress_ratios} must be drawn from {list(COMPRESS_RATIOS)}.")
        if self.sub_batch_size is not None:
            raise ValueError(f"sub_batch_size={self.sub_batch_size}: use gradient_accumulation_steps instead.")
        if self.finetune_type == "layer" and max(self.compress_ratios) > 1:
            raise ValueError(f"finetune_type=layer trains without compression, got {self.compress_ratios}; use 1.")
        if self.finetune_type == "token" and (len(self.compress_ratios) > 1 or 1 in self.compress_ratios):
            raise ValueError(
                f"finetune_type=token trains an adapter for one ratio above 1, got {self.compress_ratios}. Train one "
                "for each ratio."
            )
        if 1 not in self.compress_ratios and not self.compress_layers:
            raise ValueError(f"compress_ratios {self.compress_ratios} need compress_layers that say where to compress.")
