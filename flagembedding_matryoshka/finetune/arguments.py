"""Arguments of fine-tuning, on top of FlagEmbedding's: of the model, the data and the training."""

# No `from __future__ import annotations`: HfArgumentParser reads the types of the fields.

import json
import logging
import math
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
from FlagEmbedding.abc.finetune.reranker import (
    AbsRerankerDataArguments,
    AbsRerankerModelArguments,
    AbsRerankerTrainingArguments,
)
from peft import LoraConfig

from flagembedding_matryoshka.finetune.data import RANDOM_MARGIN
from flagembedding_matryoshka.finetune.losses import (
    DEFAULT_TERMS,
    DISTILL_LOSSES,
    GRADED_LOSSES,
    TRAIN_METHODS,
    DistillLoss,
    LabelLoss,
    LossTerms,
    TrainMethodName,
)
from flagembedding_matryoshka.finetune.sources import DATASET, parse_columns, source_files
from flagembedding_matryoshka.inference.device import warn_of_slow_bfloat16
from flagembedding_matryoshka.setting import COMPRESS_RATIOS

logger = logging.getLogger(__name__)

BEST_METRIC = "nDCG@10"
"""Measure of the best checkpoint, by default."""
REPORTED_DEFAULTS = ("learning_rate", "query_max_len", "passage_max_len", "sep_token")
"""Arguments whose default differs from FlagEmbedding's, and that change what is trained."""
LORA_OPTIONS = {
    "lora_rank": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "target_modules": None,
    "modules_to_save": None,
    "lora_options": None,
}
"""Options of a new adapter, with their defaults. They contradict `from_peft`."""
OWN_LORA_OPTIONS = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "task_type", "peft_type"),
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
}
"""Fields of LoraConfig that are arguments of their own, or that the runner sets."""
SECRETS = ("token", "hub_token", "push_to_hub_token")
Arguments = TypeVar("Arguments")


@dataclass
class MatryoshkaModelArguments(AbsRerankerModelArguments):
    """Arguments of the model, its exits and its adapters.

    Raises:
        ValueError: on a value that the model cannot use, and on contradicting values.
    """

    model_type: str = field(
        default="decoder",
        metadata={
            "help": "decoder accepts any checkpoint; from_raw_model and from_finetuned_model refuse the other kind."
        },
    )
    token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Token of the hub. Default: the environment's HF_TOKEN, or the token of `hf auth login`."},
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Text around query and passage, by name or as a JSON file. Default: the template that the model "
            "was trained with; for a raw model, the template of the published models."
        },
    )
    layer_wise: bool = field(default=True, metadata={"help": "Train a scoring head per exit; must be True."})
    start_layer: int | None = field(
        default=None, metadata={"help": "Shallowest exit of a raw model, in decoder layers. Default: 4."}
    )
    layer_sep: int | None = field(
        default=None, metadata={"help": "Decoder layers between neighbouring exits of a raw model. Default: 1."}
    )
    exits: list[int] | None = field(
        default=None,
        metadata={
            "help": "Exits of a raw model, if they are not evenly spaced. Layers above the last exit are not loaded. "
            "For a layer-wise model: its new exits. The last one must be its deepest exit, and new heads start as a "
            "copy of that exit's head. Default: start_layer and layer_sep for a raw model, the model's own exits "
            "otherwise."
        },
    )
    max_layer: int | None = field(
        default=None,
        metadata={"help": "Layers above this one are not loaded. Default: all layers up to the deepest exit."},
    )
    head_scale: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the vocabulary row of Yes, with which the scoring heads of a raw model are initialised. "
            "1, as in the paper, gives scores so large that the first loss is above that of chance. Default: 0.1, with "
            "self_distill 1."
        },
    )
    use_lora: bool = field(default=True, metadata={"help": "Train LoRA adapters; False trains all weights."})
    # __post_init__ sets the defaults of the adapters' options, so that it sees which ones are given.
    lora_rank: int = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Rank of the adapters. Default: 32."},
    )
    lora_alpha: int = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "The adapters are scaled by lora_alpha / lora_rank. Default: 64."},
    )
    lora_dropout: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Dropout of the adapters' inputs. Default: 0."},
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules with an adapter: names, a single regular expression, or all-linear. Default: all linear "
            "modules of the decoder's layers, and linear_head, the scoring heads."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules whose weights are trained and saved as a whole. Default: none."}
    )
    lora_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further options of peft's LoraConfig in JSON, such as '{\"use_dora\": true}' or "
            "'{\"use_rslora\": true}'. Default: none."
        },
    )
    from_peft: str | None = field(
        default=None, metadata={"help": "Adapter to continue training. Default: a new adapter."}
    )
    raw_peft: list[str] | None = field(
        default=None, metadata={"help": "Adapters to merge into the model before training, in order. Default: none."}
    )
    save_merged_lora_model: bool = field(
        default=False, metadata={"help": "Also write output_dir/merged_model, with the adapters merged."}
    )
    allow_pickle: bool = field(
        default=False,
        metadata={
            "help": "Read weights from pytorch_model.bin and adapter_model.bin if there are no safetensors. A pickle "
            "can run code when it is read: allow it only if its source can be trusted."
        },
    )
    use_flash_attn: bool = field(
        default=False,
        metadata={
            "help": "Refuse to train without PyTorch's FlashAttention kernel. It needs a GPU and --bf16 or --fp16, and "
            "is used wherever it runs, also without this argument."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Store the frozen weights in 4 bits (NF4) while adapters are trained (QLoRA); needs bitsandbytes."
        },
    )
    head_multi: bool = field(
        default=True, metadata={"help": "FlagEmbedding's layer-wise argument; must be True: every exit has a head."}
    )
    head_type: Literal["simple"] = field(
        default="simple",
        metadata={"help": "FlagEmbedding's layer-wise argument; must be simple: a head is one linear map."},
    )
    padding_side: Literal["right"] = field(
        default="right", metadata={"help": "The reference's argument; must be right. No batch is padded."}
    )
    loss_type: Literal["only logits"] = field(
        default="only logits",
        metadata={"help": "The reference's argument; must be 'only logits': distillation compares scores."},
    )

    def __post_init__(self) -> None:
        if self.model_type not in ("decoder", "from_raw_model", "from_finetuned_model"):
            raise ValueError(
                f"model_type is {self.model_type!r}, but must be decoder, from_raw_model or from_finetuned_model."
            )
        if not self.layer_wise:
            raise ValueError(
                "layer_wise is False, but must be True: use FlagEmbedding's own fine-tuning for a single head."
            )
        if self.padding_side != "right":
            raise ValueError(f"padding_side is {self.padding_side!r}, but no batch is padded: leave it out.")
        if self.loss_type != "only logits":
            raise ValueError(f"loss_type is {self.loss_type!r}, but must be 'only logits'.")
        if not self.head_multi:
            raise ValueError("head_multi is False, but must be True: every exit has a head.")
        if self.head_type != "simple":
            raise ValueError(f"head_type is {self.head_type!r}, but must be 'simple', one linear map.")
        if self.load_in_4bit and not self.use_lora:
            raise ValueError("load_in_4bit=True contradicts use_lora=False: weights in 4 bits cannot be trained.")
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise ImportError("load_in_4bit=True needs the package bitsandbytes: pip install bitsandbytes")
        if self.config_name is not None:
            raise ValueError(
                f"config_name is {self.config_name!r}, but the checkpoint's configuration is used: leave it out."
            )
        if self.head_scale is not None and not self.head_scale > 0:
            raise ValueError(
                f"head_scale is {self.head_scale}, but must be above 0: a head of zeros has no gradient for the layers."
            )
        if isinstance(self.lora_options, str):
            self.lora_options = _parse_lora_options(self.lora_options)
        if self.from_peft is not None:
            own = {name: getattr(self, name) for name in LORA_OPTIONS if getattr(self, name) is not None}
            if own:
                raise ValueError(
                    f"from_peft={self.from_peft} continues an adapter with its own configuration, but {own} is given: "
                    "leave these arguments out, or train a new adapter with raw_peft."
                )
        for name, default in LORA_OPTIONS.items():
            if self.from_peft is None and getattr(self, name) is None:
                setattr(self, name, default)
        if not self.use_lora and self.lora_options:
            raise ValueError(f"use_lora=False contradicts lora_options={self.lora_options}: there is no adapter.")
        if not self.use_lora and (self.from_peft is not None or self.save_merged_lora_model):
            raise ValueError("use_lora=False contradicts from_peft and save_merged_lora_model: there is no adapter.")


def _parse_lora_options(text: str) -> dict[str, Any]:
    """Parse `lora_options`.

    Raises:
        ValueError: if the text is not a JSON object, or names an option that peft does not have, or that is an argument
            of its own.
    """
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"lora_options is not JSON ({error}): {text!r:.80}") from error
    allowed = {item.name for item in fields(LoraConfig) if item.init} - OWN_LORA_OPTIONS
    unknown = sorted(set(options) - allowed) if isinstance(options, dict) else [text]
    if unknown:
        raise ValueError(
            f"lora_options: {', '.join(unknown)} is not among peft's options, or is an argument of its own. Allowed: a "
            f"JSON object with {', '.join(sorted(allowed))}."
        )
    return options


@dataclass
class MatryoshkaDataArguments(AbsRerankerDataArguments):
    """Arguments of the training data and of the sequence that a pair becomes.

    Raises:
        FileNotFoundError: if a file or directory does not exist.
        ValueError: if no training data is named, a file's name is not that of JSON Lines, or a value is out of range.
    """

    knowledge_distillation: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the rows' teacher scores are used. train_method decides this, and a value that "
            "contradicts it is refused."
        },
    )
    query_instruction_for_rerank: str | None = field(
        default=None, metadata={"help": "Text before a query. Default: the template's."}
    )
    passage_instruction_for_rerank: str | None = field(
        default=None, metadata={"help": "Text before a passage. Default: the template's."}
    )
    sep_token: str | None = field(
        default=None, metadata={"help": "Text after the query and after the passage. Default: the template's."}
    )
    query_max_len: int = field(
        default=32,
        metadata={
            "help": "Tokens of a query. The templates cost_wise, gemma2-lightweight, minicpm and bge-gemma count its "
            "instruction too; any other template comes on top."
        },
    )
    passage_max_len: int = field(
        default=192,
        metadata={
            "help": "Tokens of a passage. With the templates cost_wise, gemma2-lightweight, minicpm and bge-gemma, the "
            "whole sequence is truncated to query_max_len + passage_max_len; any other template comes on top."
        },
    )

    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "FlagEmbedding's argument, without effect: no batch is padded."}
    )
    eval_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files or directories as in train_data. At each checkpoint every exit ranks their lists, MRR@10 "
            "and nDCG@10 are logged, and the best checkpoint is kept. Default: no evaluation."
        },
    )
    eval_beir: list[str] | None = field(
        default=None,
        metadata={
            "help": "Directories in BEIR's layout. At each checkpoint BM25's candidates of their judged queries are "
            "ranked at eval_settings, and nDCG@10 is logged. Needs the extra mining. Default: none."
        },
    )
    eval_settings: list[str] | None = field(
        default=None,
        metadata={
            "help": 'Depths, widths and cascades of eval_beir, each a JSON object: \'{"cutoff_layers": 9, '
            '"compress_layers": [3], "compress_ratio": 2}\', \'{"cascade": {"9": 0.3}}\'. Default: every exit at '
            "full width."
        },
    )
    eval_split: str = field(
        default="test", metadata={"help": "The judgements of eval_beir are qrels/{eval_split}.tsv."}
    )
    eval_top_k: int = field(default=100, metadata={"help": "Number of BM25's candidates of each query of eval_beir."})
    eval_queries: int | None = field(
        default=None, metadata={"help": "Size of a random sample of the queries of each eval_beir. Default: all."}
    )
    random_negatives: float = field(
        default=0.0,
        metadata={
            "help": "Share of a group's negatives that are passages of other rows of the same file, drawn again each "
            "epoch. They differ from each other, from the query and from all passages of the row. Their teacher score "
            f"is the row's lowest minus {RANDOM_MARGIN:g}. With 1, neg may be empty. Use them if the loss of a small "
            "model stays at chance because all mined negatives are too hard."
        },
    )
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the files that have another name there, as NAME=THEIRS: query=question pos=positive. "
            "Several for a list are joined: neg=negative_1 neg=negative_2. A text becomes a list of one."
        },
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "A weight for each file of train_data: the rows of an epoch are in this proportion, and as many as "
            "all files have. Default: each row once."
        },
    )
    one_source_per_batch: bool = field(
        default=False,
        metadata={"help": "Fill each pass of all processes with rows of one file; what is left at the end is mixed."},
    )
    skip_bad_lines: bool = field(
        default=False, metadata={"help": "Leave out lines with a fault and log their number, instead of stopping."}
    )

    def __post_init__(self) -> None:
        if not self.train_data:
            raise ValueError("train_data is empty: name one or more files, directories of them, or data sets.")
        paths: str | list[str] = self.train_data
        found = source_files([paths] if isinstance(paths, str) else paths)
        if self.eval_data is not None:
            self.eval_data = source_files(self.eval_data)
        self.train_data: list[str] = [path for path in found if not path.startswith(DATASET)]
        super().__post_init__()  # checks that the files exist
        self.train_data = found
        if self.eval_beir is None and self.eval_settings is not None:
            raise ValueError(f"eval_settings={self.eval_settings} needs eval_beir, directories in BEIR's layout.")
        for name in ("eval_top_k", "eval_queries"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} is {count}, but must be at least 1.")
        self.column_mapping = parse_columns(self.columns or [])
        if self.data_weights is not None and (
            len(self.data_weights) != len(found) or not all(0 < weight < math.inf for weight in self.data_weights)
        ):
            raise ValueError(
                f"data_weights are {self.data_weights}, but must be one number above 0 for each of {', '.join(found)}."
            )
        if self.max_len != AbsRerankerDataArguments.max_len:
            raise ValueError(f"max_len={self.max_len} has no effect: use query_max_len and passage_max_len.")
        if self.train_group_size < 2:
            raise ValueError(
                f"train_group_size is {self.train_group_size}, but must be at least 2: a positive and a negative."
            )
        if not 0 <= self.random_negatives <= 1:
            raise ValueError(f"random_negatives is {self.random_negatives}, but must be a share from 0 to 1.")


@dataclass
class MatryoshkaTrainingArguments(AbsRerankerTrainingArguments):
    """Arguments of the training method and of the settings to train, and all of transformers' `TrainingArguments`.

    Raises:
        ImportError: if DeepSpeed is asked for and not installed.
        ValueError: on a value out of range, and on contradicting values.
    """

    # The defaults of train_method, learning_rate and compress_ratios depend on finetune_type: __post_init__ sets them.
    train_method: TrainMethodName = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "Teacher of an exit, in addition to the labels: the next deeper exit (last_layer), the deepest "
            "exit (final_layer), every 8th exit (fix_layer), the teacher scores in the data (teacher); or, without "
            "labels, the model before training (self_distill). Default: distill_fix_layer_teacher, with finetune_type "
            "normal."
        },
    )
    distill_loss: DistillLoss = field(
        default="ce",
        metadata={
            "help": "Loss between an exit's scores and its teacher's: of the softmax over the group (ce, kl), or of "
            "raw scores (mse, margin_mse)."
        },
    )
    label_loss: LabelLoss = field(
        default="contrastive",
        metadata={
            "help": "Loss between an exit's scores and the labels. contrastive has one positive in a group. The others "
            "have several, with grades: pairwise (ranknet, lambda), listwise (listnet, plistmle, adr_mse) or pointwise "
            "(bce). At most half of a group are positives, more if a row has too few negatives."
        },
    )
    distill_temperature: float = field(
        default=1.0,
        metadata={"help": "Divisor of the scores of exit and teacher in the distill_loss ce and kl."},
    )
    label_weight: float = field(default=1.0, metadata={"help": "Weight of the loss of the labels."})
    distill_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss of the teacher: the data's scores, or the loaded model."}
    )
    deeper_exit_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss of the deeper exit that teaches."}
    )
    exit_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weights of the exits' losses, from the shallowest to the deepest. Default: 1 for each."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Search for weights without a gradient. There are none: every exit is trained in every step."
        },
    )
    learning_rate: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default: 2e-4, with finetune_type 2e-5, as in the paper."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume. Without a value: the newest complete checkpoint in output_dir, if there is "
            "one. Default: a new run.",
            "nargs": "?",
            "const": "last",
        },
    )
    overwrite_output_dir: bool = field(
        default=True, metadata={"help": "False refuses an output_dir with files in it, unless the run is resumed."}
    )
    compress_layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Layers after which the passage may be compressed. Each one compresses in half of the steps. "
            "Default: none."
        },
    )
    compress_ratios: list[int] = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "Compression ratios; each step draws one. 1 is no compression. Default: 1 2 4 8, with "
            "finetune_type layer 1, with finetune_type token 2."
        },
    )
    store_layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Layers up to which passages run apart from their queries, so that their states can be stored. "
            "Each step draws one of them or none, with the same probability, and compresses after it. Exits up to it "
            "are scored without it, in a pass of their own. Default: none."
        },
    )
    finetune_type: Literal["layer", "token"] | None = field(
        default=None,
        metadata={
            "help": "Train a compensation adapter, the paper's second stage: layer compensates for missing layers, at "
            "full width; token compensates for compression, at one ratio. The adapter's configuration stores it, and "
            "scoring applies the adapter accordingly. Default: the first stage."
        },
    )
    stop_on_collapse: bool = field(
        default=False,
        metadata={
            "help": "Stop the run with an error if all exits rank at chance long after the warm-up, a loss is not "
            "finite, or the gradients explode. Without it a warning is logged."
        },
    )
    dataloader_num_workers: int = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Processes that tokenise and pack batches ahead of a step. Default: 2 on a GPU, otherwise 0."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this number of evaluations in a row without a better metric_for_best_model, and write "
            "the best checkpoint. Needs eval_data. Default: train all steps."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "Least improvement of the metric that counts for early_stopping_patience."}
    )
    average_last: int = field(
        default=1,
        metadata={
            "help": "Write the mean of the weights of this many states: the final state and the last checkpoints "
            "before it. save_total_limit must be at least this number; with eval_data, at least one more."
        },
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Share of the steps in which the learning rate rises. Default: warmup_steps."}
    )

    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave losses that are not finite out of the log. Each step then waits for the device."},
    )

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            if self.warmup_steps or not 0 <= self.warmup_ratio < 1:
                raise ValueError(
                    f"warmup_ratio is {self.warmup_ratio}, but must be in [0, 1), and without warmup_steps."
                )
            # transformers 5 has no warmup_ratio and reads a fraction in warmup_steps as the ratio.
            self.warmup_steps: float = self.warmup_ratio
        # transformers 5.23 deprecates the name gradient_checkpointing, which FlagEmbedding's command lines have.
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}", False) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if torch.accelerator.is_available() and not self.use_cpu else 0
        if self.deepspeed is not None and find_spec("deepspeed") is None:
            raise ImportError(f"deepspeed={self.deepspeed} needs the package deepspeed: pip install deepspeed")
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(f"early_stopping_patience is {self.early_stopping_patience}, but must be at least 1.")
            self.load_best_model_at_end = True
            self.restore_callback_states_from_checkpoint = True  # a resumed run continues to count
        elif self.early_stopping_threshold:
            raise ValueError(f"early_stopping_threshold={self.early_stopping_threshold} needs early_stopping_patience.")
        if self.load_best_model_at_end:
            evaluate_checkpoints(self)
        compensates = self.finetune_type is not None
        if self.train_method is None:
            self.train_method = "normal" if compensates else "distill_fix_layer_teacher"
        if self.learning_rate is None:
            self.learning_rate = 2e-5 if compensates else 2e-4
        if self.compress_ratios is None:
            self.compress_ratios = {None: list(COMPRESS_RATIOS), "layer": [1], "token": [2]}.get(self.finetune_type, [])
        has_own = self.accelerator_config is not None
        super().__post_init__()
        if not has_own:
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
        if self.train_method not in TRAIN_METHODS:
            raise ValueError(f"train_method is {self.train_method!r}, but must be one of {list(TRAIN_METHODS)}.")
        if self.distill_loss not in DISTILL_LOSSES:
            raise ValueError(f"distill_loss is {self.distill_loss!r}, but must be one of {list(DISTILL_LOSSES)}.")
        self._check_losses()
        if self.finetune_type not in (None, "layer", "token"):
            raise ValueError(f"finetune_type is {self.finetune_type!r}, but must be layer or token, or left out.")
        if self.exit_weights is not None and not all(weight >= 0 for weight in self.exit_weights):
            raise ValueError(f"exit_weights are {self.exit_weights}, but must be at least 0.")
        unknown = [ratio for ratio in self.compress_ratios if ratio not in COMPRESS_RATIOS]
        if unknown or not self.compress_ratios:
            raise ValueError(f"compress_ratios are {self.compress_ratios}, but must be among {list(COMPRESS_RATIOS)}.")
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process: start a process for each GPU with torchrun "
                f"--nproc_per_node {self.n_gpu}, or make one GPU visible with CUDA_VISIBLE_DEVICES=0."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}, which needs items of one known length: "
                "use random, which distributes the rows of a step to the processes by length, or sequential."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not supported: the loss has no class labels."
            )
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} is not supported: leave it out, or use lora_dropout."
            )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16=True needs a GPU, and this run is on the CPU: use bf16, or leave it out.")
        if self.bf16:
            warn_of_slow_bfloat16(torch.bfloat16, self.device)
        if self.sub_batch_size is not None:
            raise ValueError(f"sub_batch_size={self.sub_batch_size} is not supported: use gradient_accumulation_steps.")
        if self.finetune_type == "layer" and max(self.compress_ratios) > 1:
            raise ValueError(
                f"finetune_type=layer trains without compression, but compress_ratios are {self.compress_ratios}: use "
                "1."
            )
        if self.finetune_type == "token" and (len(self.compress_ratios) > 1 or 1 in self.compress_ratios):
            raise ValueError(
                f"finetune_type=token trains an adapter for one ratio above 1, but compress_ratios are "
                f"{self.compress_ratios}: train an adapter for each ratio."
            )
        if any(layer < 1 for layer in self.store_layers):
            raise ValueError(
                f"store_layers are {self.store_layers}, but must be at least 1: each step draws one of them or none."
            )
        if 1 not in self.compress_ratios and not self.compress_layers:
            raise ValueError(
                f"compress_ratios {self.compress_ratios} need compress_layers, the layers after which to compress."
            )

    @property
    def loss_terms(self) -> LossTerms:
        """The losses of all terms and their weights."""
        return LossTerms(**{item.name: getattr(self, item.name) for item in fields(LossTerms)})

    def _check_losses(self) -> None:
        """Raise ValueError if a loss or weight is out of range, or has no effect with `train_method`."""
        if self.label_loss != "contrastive" and self.label_loss not in GRADED_LOSSES:
            allowed = ["contrastive", *GRADED_LOSSES]
            raise ValueError(f"label_loss is {self.label_loss!r}, but must be one of {allowed}.")
        if not self.distill_temperature > 0:
            raise ValueError(f"distill_temperature is {self.distill_temperature}, but must be above 0.")
        if self.distill_temperature != 1 and self.distill_loss not in ("ce", "kl"):
            raise ValueError(
                f"distill_temperature={self.distill_temperature} needs distill_loss ce or kl: {self.distill_loss} "
                "compares raw scores."
            )
        method = TRAIN_METHODS[self.train_method]
        has_teacher = method.original or method.data_scores != "none"
        has_deeper = method.deeper_exit != "none"
        used = {
            "label_loss": not method.original,
            "label_weight": not method.original,
            "distill_weight": has_teacher,
            "deeper_exit_weight": has_deeper,
            "distill_loss": has_teacher or has_deeper,
            "distill_temperature": has_teacher or has_deeper,
        }
        weights = {name: getattr(self, name) for name in used if name.endswith("_weight")}
        if not all(0 <= weight < math.inf for weight in weights.values()):
            raise ValueError(f"the weights are {weights}, but must be at least 0.")
        for name, is_used in used.items():
            if not is_used and getattr(self, name) != getattr(DEFAULT_TERMS, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect: train_method {self.train_method} has no such term."
                )
        if not any(weight for name, weight in weights.items() if used[name]):
            raise ValueError(f"the weights of all terms are 0: {weights}.")


def evaluate_checkpoints(args: Any) -> None:
    """Set `TrainingArguments` to evaluate at every checkpoint and to keep the best one by nDCG@10.

    Values that the user has set stay. transformers' default measure is a loss, which the evaluation does not have.
    """
    if args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = BEST_METRIC, True
    if args.eval_strategy == "no":
        args.eval_strategy, args.eval_steps = args.save_strategy, args.save_steps


def describe_run(*arguments: Any) -> dict[str, Any]:
    """Return the arguments of a run by name, as `--config` reads them.

    Values that equal the default are left out, and so are empty lists, tokens and the checkpoint that was resumed.
    Values that depend on other arguments are the resolved ones.

    Args:
        arguments: argument objects of model, data and training.
    """
    values: dict[str, Any] = {}
    for given in arguments:
        for item in fields(given):
            value = getattr(given, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            left_out = item.name in (*SECRETS, "resume_from_checkpoint") or value in ([], {})
            if item.init and value != default and not left_out:
                values[item.name] = value
    # `warmup_steps` is derived from `warmup_ratio`, and the new name of checkpointing from the old one.
    if "warmup_ratio" in values:
        del values["warmup_steps"]
    for name in ("checkpointing", "checkpointing_kwargs"):
        values.pop(f"activation_{name}", None)
    as_json = json.dumps(values, default=lambda value: value.value if isinstance(value, Enum) else value.to_dict())
    return json.loads(as_json)


def convert_arguments(ours: type[Arguments], given: Any) -> Arguments:
    """Convert an argument object of FlagEmbedding's to one of our classes.

    Values that differ from FlagEmbedding's default are kept. All others get our default. A warning names values that
    change thereby, because FlagEmbedding's objects do not say which values were given.

    Raises:
        ValueError: if a value is set that our class has no argument for.
    """
    if isinstance(given, ours):
        return given
    names = {item.name for item in fields(ours) if item.init}  # type: ignore[arg-type]
    changed = {}
    for item in fields(given):
        value = getattr(given, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if item.init and value != default:
            changed[item.name] = value
    unknown = {name: value for name, value in changed.items() if name not in names}
    if unknown:
        raise ValueError(f"{type(given).__name__} sets {unknown}, but {ours.__name__} has no such argument.")
    converted = ours(**changed)
    replaced = [
        f"{item.name}: {getattr(given, item.name)!r} becomes {getattr(converted, item.name)!r}"
        for item in fields(given)
        if item.name in REPORTED_DEFAULTS and getattr(given, item.name) != getattr(converted, item.name)
    ]
    if replaced:
        logger.warning("FlagEmbedding's defaults are replaced by ours. %s. Use %s.", "; ".join(replaced), ours.__name__)
    return converted
