"""A Matryoshka re-ranker as a module of sentence-transformers' CrossEncoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.inference.device import resolve_dtype
from flagembedding_matryoshka.inference.inputs import as_lists
from flagembedding_matryoshka.models.adapters import token_adapter_ratio
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.gguf import resolve
from flagembedding_matryoshka.models.loading import inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.models.query_sharing import pack_pairs
from flagembedding_matryoshka.models.shipped import locate
from flagembedding_matryoshka.setting import Layers, Setting
from flagembedding_matryoshka.text.pairs import PairTokenizer
from flagembedding_matryoshka.text.templates import Template

HUB = ("token", "cache_folder", "revision", "local_files_only")
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
        """Pairs of strings as {"pairs": a list of TokenizedPair}; `prompt` stands behind the passage."""
        if any(isinstance(text, str) for text in inputs):
            # A column alone, of which the trainer's model card counts the characters; it cannot be scored.
            return {"texts": inputs}
        template = replace(
            self.pair_tokenizer.template,
            query_instruction=self.query_instruction,
            passage_instruction=self.passage_instruction,
            prompt=self.prompt if prompt is None else prompt,
        )
        return {"pairs": self.pair_tokenizer.build_within(inputs, self.query_max_length, self.max_length, template)}

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
        **kwargs: Any,
    ) -> MatryoshkaModule:
        """A layer-wise checkpoint or a directory that fine-tuning wrote, in float32; adapters are merged.

        Args:
            kwargs: what CrossEncoder gives to all modules: of `model_kwargs` "dtype" (or "torch_dtype"), of
                `processor_kwargs` "model_max_length", which is its `max_length`, and of `config_kwargs` "num_labels".

        Raises:
            ValueError: on others, and if the directory is an adapter for one compression ratio alone, which cannot be
                merged.
        """
        dtype, max_length = _options_of_loading(subfolder, **{name: kwargs.get(name) for name in KWARGS})
        hub: dict[str, Any] = {
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        hub = {name: value for name, value in hub.items() if value}
        checkpoint = inspect_checkpoint(model_name_or_path, **hub)
        for adapter in checkpoint.adapters:
            ratio = token_adapter_ratio(adapter, **hub)
            if ratio is not None:
                raise ValueError(
                    f"{adapter} is an adapter for compress_ratio={ratio} alone and cannot be merged; score with "
                    "MatryoshkaReranker."
                )
        tokenizer = load_tokenizer(model_name_or_path, **hub)
        model = load_model(checkpoint, tokenizer, dtype, **hub)
        model.config.raw_peft = []
        config = cls.load_config(
            resolve(locate(model_name_or_path), cache_folder),
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        if max_length is not None:
            config["max_length"] = max_length
        return cls(model, tokenizer, **config)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write a checkpoint that `MatryoshkaReranker` loads too."""
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        self.save_config(output_path)


class MatryoshkaCrossEncoder(CrossEncoder):
    """A CrossEncoder whose `rank` takes the depth and width that its `predict` takes."""

    def rank(  # type: ignore[override]
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, int | float | str]]:
        """As `CrossEncoder.rank`, by the scores before the activation, which may make some equal.

        Args:
            options: of `predict`, as `cutoff_layers`, `compress_layers`, `compress_ratio` and `batch_size`.

        Raises:
            TypeError: if `documents` is no list of strings.
        """
        (query,), (documents,) = as_lists([query], [documents])
        if not documents:
            return []
        activation = options.pop("activation_fn", None) or self.activation_fn or nn.Identity()
        options |= {"activation_fn": nn.Identity(), "convert_to_tensor": True}
        raw = self.predict([(query, document) for document in documents], **options).float().cpu()
        scores = activation(raw).tolist()
        return [
            {"corpus_id": index, "score": scores[index]} | ({"text": documents[index]} if return_documents else {})
            for index in raw.argsort(descending=True, stable=True)[:top_k].tolist()
        ]


def load_cross_encoder(
    path: str, *, max_length: int | None = None, num_labels: int | None = None, **kwargs: Any
) -> MatryoshkaCrossEncoder:
    """A CrossEncoder of "smollm2" or any checkpoint, whose `predict` gives what `compute_score` does: no sigmoid.

    What `export` and fine-tuning write, `CrossEncoder(path, trust_remote_code=True)` loads too: sentence-transformers
    imports modules of other packages only then. This needs none.

    Args:
        max_length: tokens of bos, query, separator and passage; None is the checkpoint's own.
        num_labels: 1 or None.
        kwargs: others of CrossEncoder, as `device`, `model_kwargs={"dtype": …}`, `revision` and `token`.

    Raises:
        ValueError: as `MatryoshkaModule.load`.
    """
    of_loading = {name: kwargs.pop(name) for name in (*HUB, *KWARGS) if name in kwargs}
    if max_length is not None:
        of_loading["processor_kwargs"] = {**of_loading.get("processor_kwargs", {}), "model_max_length": max_length}
    if num_labels is not None:
        of_loading["config_kwargs"] = {**of_loading.get("config_kwargs", {}), "num_labels": num_labels}
    module = MatryoshkaModule.load(path, **of_loading)
    return MatryoshkaCrossEncoder(modules=[module], **{"activation_fn": nn.Identity(), **kwargs})


def _options_of_loading(
    subfolder: str,
    model_kwargs: dict[str, Any] | None,
    processor_kwargs: dict[str, Any] | None,
    config_kwargs: dict[str, Any] | None,
) -> tuple[torch.dtype, int | None]:
    """The dtype and the maximal length that CrossEncoder's arguments ask for.

    Raises:
        ValueError: on any other argument.
    """
    model, processor, config = dict(model_kwargs or {}), dict(processor_kwargs or {}), dict(config_kwargs or {})
    dtype = model.pop("dtype", None) or model.pop("torch_dtype", None) or torch.float32
    max_length, labels = processor.pop("model_max_length", None), config.pop("num_labels", 1)
    if labels != 1:
        raise ValueError(f"num_labels={labels}, but a re-ranker has one score for a pair.")
    if dtype == "auto":
        raise ValueError("model_kwargs={'dtype': 'auto'}: name a dtype; without one it is float32.")
    if subfolder or model or processor or config:
        raise ValueError(
            f"subfolder={subfolder!r}, model_kwargs={model}, processor_kwargs={processor}, config_kwargs={config}: a "
            "MatryoshkaModule is loaded without these; of them it takes a dtype, model_max_length and num_labels=1."
        )
    return resolve_dtype(dtype, use_fp16=False, use_bf16=False, device="cpu"), max_length
