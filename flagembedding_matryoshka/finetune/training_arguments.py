"""What the command line says of training, checked where it enters."""

# No `from __future__ import annotations`: HfArgumentParser reads the types of the fields.

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from FlagEmbedding.abc.finetune.reranker import AbsRerankerTrainingArguments

from flagembedding_matryoshka.finetune.evaluation import rank_checkpoints
from flagembedding_matryoshka.finetune.losses import DISTILL_LOSSES, TRAIN_METHODS, DistillLoss, TrainMethodName
from flagembedding_matryoshka.setting import COMPRESS_RATIOS


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
            "(final_layer), every 8th (fix_layer), the data's scores (teacher); or, without labels, the model as it "
            "was loaded (self_distill). Default: distill_fix_layer_teacher, with finetune_type normal."
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
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for weights without a gradient; every exit learns in every step."}
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
    stop_on_collapse: bool = field(
        default=False,
        metadata={
            "help": "End the run with an error where all exits rank by chance long after the warm-up, a loss is no "
            "number or the gradients explode, which is warned of anyway."
        },
    )
    average_last: int = field(
        default=1,
        metadata={
            "help": "Write the mean of the weights of this many states: the final state and the last checkpoints "
            "before it. save_total_limit must be at least this number, with eval_data at least one more."
        },
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Share of the steps in which the learning rate rises; or give warmup_steps."}
    )

    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave losses that are not finite out of the log, for which each step waits for the device."},
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
        has_own = self.accelerator_config is not None
        super().__post_init__()
        if not has_own:
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
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
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process: start one for each, torchrun --nproc_per_node "
                f"{self.n_gpu}, or show it a single one, CUDA_VISIBLE_DEVICES=0."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}, which needs items of one known length: "
                "use random, which deals the rows of a step out to the processes by length, or sequential."
            )
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
