"""A Matryoshka re-ranker as a module of sentence-transformers' CrossEncoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratio
from flagembedding_matryoshka.checkpoints.export import SENTENCE_TRANSFORMERS_FILE, remove_written
from flagembedding_matryoshka.checkpoints.gguf import resolve
from flagembedding_matryoshka.checkpoints.loading import hub_options, inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.checkpoints.shipped import locate
from flagembedding_matryoshka.inference.device import resolve_dtype
from flagembedding_matryoshka.inference.inputs import are_tokenized, as_pairs
from flagembedding_matryoshka.integrations.model_card import use_our_card
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.packing import pack_pairs
from flagembedding_matryoshka.setting import Layers, Setting
from flagembedding_matryoshka.text.pairs import PairTokenizer
from flagembedding_matryoshka.text.templates import Template

KWARGS = ("model_kwargs", "processor_kwargs", "config_kwargs")


class MatryoshkaModule(InputModule):
    """Packs pairs and scores them; nothing is padded.

    `CrossEncoder.predict` takes `cutoff_layers` (one), `compress_layers` and `compress_ratio` per call.
    """

    config_file_name = "matryoshka_config.json"
    config_keys = ["query_instruction", "passage_instruction", "prompt", "query_max_length", "max_length"]
    forward_kwargs = {"cutoff_layers", "compress_layers", "compress_ratio"}
    save_in_root = True

    def __init__(
        self,
        model: CostWiseForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        query_instruction: str | None = None,
        passage_instruction: str | None = None,
        prompt: str | None = None,
        query_max_length: int | None = None,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        self.model = model
        template = Template.load(model.config.template).replaced(
            query_instruction=query_instruction, passage_instruction=passage_instruction, prompt=prompt
        )
        self.pair_tokenizer = PairTokenizer(tokenizer, template)
        self.query_instruction = template.query_instruction
        self.passage_instruction = template.passage_instruction
        self.prompt = template.prompt
        self.query_max_length = query_max_length
        self.max_length = max_length
        self.base: str | None = None
        self.activation = "identity"

    def on_model_ready(self, model: Any) -> None:
        """sentence-transformers' last step of construction."""
        use_our_card(model, self.base)

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """sentence-transformers' name for `tokenizer`."""
        return self.tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of texts; set it to have others from now on."""
        return self.pair_tokenizer.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: PreTrainedTokenizerBase) -> None:
        self.pair_tokenizer = PairTokenizer(value, self.pair_tokenizer.template)

    @property
    def max_seq_length(self) -> int:
        """What `CrossEncoder.max_length` reads and sets: tokens of bos, query, separator and passage."""
        return self.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.max_length = value

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Pairs of strings as {"pairs": a list of TokenizedPair}.

        Args:
            prompt: the instruction, as of sentence-transformers' re-rankers that take messages; None is the
                checkpoint's own, "" is none.

        Raises:
            TypeError: on other arguments than those of `forward`, and if something is no pair of strings.
            ValueError: if the model's template has no place for an instruction.
        """
        if any(isinstance(text, str) for text in inputs):
            # A column alone, of which the trainer's model card counts the characters; it cannot be scored.
            return {"texts": inputs}
        unknown = sorted(
            name for name, value in kwargs.items() if name not in self.forward_kwargs and value is not None
        )
        if unknown:
            raise TypeError(
                f"unknown arguments {unknown}; beside CrossEncoder's own there are {sorted(self.forward_kwargs)}. "
                "CrossEncoder's name of an instruction is prompt."
            )
        template = replace(
            self.pair_tokenizer.template,
            query_instruction=self.query_instruction,
            passage_instruction=self.passage_instruction,
            prompt=self.prompt,
        ).with_instruction(prompt)
        pairs = as_pairs(inputs)
        if are_tokenized(pairs):
            raise TypeError("a CrossEncoder makes tokens of texts itself: give it pairs of strings.")
        return {"pairs": self.pair_tokenizer.build_within(pairs, self.query_max_length, self.max_length, template)}

    def forward(  # type: ignore[override]
        self,
        features: dict[str, Any],
        cutoff_layers: Layers = None,
        compress_layers: Layers = None,
        compress_ratio: int = 1,
    ) -> dict[str, Tensor | Any]:
        """Adds "scores", (pairs, 1) float32.

        Raises:
            TypeError: if the inputs were not pairs.
            ValueError: if the options do not fit the model, or several cutoff layers are given.
        """
        if "pairs" not in features:
            raise TypeError("a CrossEncoder scores pairs of query and passage, got single texts.")
        setting = Setting.resolve(self.model.config, cutoff_layers, compress_layers, compress_ratio)
        if len(setting.cutoff_layers) != 1:
            raise ValueError(
                f"a CrossEncoder has one score for a pair, got cutoff_layers={list(setting.cutoff_layers)}."
            )
        states = self.model.model.embed(*pack_pairs(features["pairs"], self.model.device))
        features["scores"] = self.model.scores(states, setting).T
        return features

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        backend: str = "torch",
        **kwargs: Any,
    ) -> MatryoshkaModule:
        """A layer-wise checkpoint or a directory that fine-tuning wrote, in float32; adapters are merged.

        Args:
            trust_remote_code: as in transformers, for the tokenizer alone.
            backend: "torch".
            kwargs: what CrossEncoder gives to all modules: of `model_kwargs` "dtype" (or "torch_dtype"; "auto" is the
                checkpoint's), of `processor_kwargs` "model_max_length", which is its `max_length`, and of
                `config_kwargs` "num_labels".

        Raises:
            ValueError: on others, and if the directory is an adapter for one compression ratio alone, which cannot be
                merged.
        """
        if backend != "torch":
            raise ValueError(f"backend={backend!r}, but a MatryoshkaModule is computed by 'torch' alone.")
        dtype, max_length = _options_of_loading(subfolder, **{name: kwargs.get(name) for name in KWARGS})
        hub = hub_options(cache_folder, token, revision, local_files_only)
        checkpoint = inspect_checkpoint(model_name_or_path, trust_remote_code=trust_remote_code, **hub)
        checkpoint.description.check_scoring()
        for adapter in checkpoint.adapters:
            ratio = token_adapter_ratio(adapter, **checkpoint.hub_of(adapter, hub))
            if ratio is not None:
                raise ValueError(
                    f"{adapter} is an adapter for compress_ratio={ratio} alone and cannot be merged; score with "
                    "MatryoshkaReranker."
                )
        tokenizer = load_tokenizer(model_name_or_path, trust_remote_code, **hub)
        stored: Any = checkpoint.config.dtype or torch.float32
        model = load_model(checkpoint, tokenizer, dtype or stored, **hub)
        model.config.raw_peft = []
        config = cls.load_config(
            resolve(locate(model_name_or_path), cache_folder),
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        length = checkpoint.description.max_length.value if max_length is None else max_length
        if length is not None:
            config["max_length"] = length
        module = cls(model, tokenizer, **config)
        module.base = checkpoint.base
        module.activation = checkpoint.description.activation.value
        return module

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write a checkpoint that `MatryoshkaReranker` loads too, in place of one that the directory holds.

        Raises:
            ValueError: if the weights are not to be in safetensors.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: weights are written in safetensors alone.")
        remove_written(output_path, kept=[SENTENCE_TRANSFORMERS_FILE])  # which CrossEncoder writes before its modules
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        self.save_config(output_path)


def _options_of_loading(
    subfolder: str,
    model_kwargs: dict[str, Any] | None,
    processor_kwargs: dict[str, Any] | None,
    config_kwargs: dict[str, Any] | None,
) -> tuple[torch.dtype | None, int | None]:
    """The dtype, None for the checkpoint's, and the maximal length that CrossEncoder's arguments ask for.

    Raises:
        ValueError: on any other argument.
    """
    model, processor, config = dict(model_kwargs or {}), dict(processor_kwargs or {}), dict(config_kwargs or {})
    dtype = model.pop("dtype", None) or model.pop("torch_dtype", None) or torch.float32
    max_length, labels = processor.pop("model_max_length", None), config.pop("num_labels", 1)
    if labels != 1:
        raise ValueError(f"num_labels={labels}, but a re-ranker has one score for a pair.")
    if subfolder or model or processor or config:
        raise ValueError(
            f"subfolder={subfolder!r}, model_kwargs={model}, processor_kwargs={processor}, config_kwargs={config}: a "
            "MatryoshkaModule is loaded without these; of them it takes a dtype, model_max_length and num_labels=1."
        )
    if dtype == "auto":
        return None, max_length
    return resolve_dtype(dtype, use_fp16=False, use_bf16=False, device="cpu"), max_length
