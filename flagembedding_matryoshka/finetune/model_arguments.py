"""What the command line says of the model, checked where it enters."""

# No `from __future__ import annotations`: HfArgumentParser reads the types of the fields.

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from FlagEmbedding.abc.finetune.reranker import AbsRerankerModelArguments


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
            "them are not loaded. A layer-wise model can be given others, too: the last must be its deepest, as whose "
            "head the new ones start."
        },
    )
    max_layer: int | None = field(
        default=None, metadata={"help": "Layers above this one are neither loaded nor trained."}
    )
    head_scale: float | None = field(
        default=None,
        metadata={
            "help": "The scoring heads of a raw model start as the vocabulary row of Yes times this. 1, as in the "
            "paper, starts with scores so large that the first loss lies above that of chance. Default: 0.1, with "
            "self_distill 1."
        },
    )
    use_lora: bool = field(default=True, metadata={"help": "Train low-rank adapters; False trains all weights."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the adapters, divided by their rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get an adapter: names, a single regular expression, or all-linear (default: all "
            "linear ones of the decoder's layers, and linear_head, the scoring heads)."
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
    padding_side: Literal["right"] = field(
        default="right", metadata={"help": "The reference's argument; here no batch is padded."}
    )
    loss_type: Literal["only logits"] = field(
        default="only logits", metadata={"help": "Distillation is on scores alone."}
    )

    def __post_init__(self) -> None:
        if self.model_type not in ("decoder", "from_raw_model", "from_finetuned_model"):
            raise ValueError(f"model_type is {self.model_type!r}: use decoder, from_raw_model or from_finetuned_model.")
        if not self.layer_wise:
            raise ValueError("layer_wise=False: FlagEmbedding's own decoder-only fine-tuning trains a single head.")
        if self.padding_side != "right":
            raise ValueError(f"padding_side is {self.padding_side!r}: here no batch is padded; leave it out.")
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
        if self.head_scale is not None and not self.head_scale > 0:
            raise ValueError(f"head_scale is {self.head_scale}, but must be above 0: a head of zeros teaches no layer.")
        if not self.use_lora and (self.from_peft is not None or self.save_merged_lora_model):
            raise ValueError("use_lora=False contradicts from_peft and save_merged_lora_model: there is no adapter.")
