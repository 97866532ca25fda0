"""A Matryoshka re-ranker as a module of sentence-transformers' CrossEncoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.models.configuration import SubNetwork
from flagembedding_matryoshka.models.decoder import CostWiseMistralForCausalLM, Layers
from flagembedding_matryoshka.models.gguf import resolve
from flagembedding_matryoshka.models.loading import inspect_checkpoint, load_model, load_tokenizer, token_adapter_ratio
from flagembedding_matryoshka.models.packing import pack_pairs
from flagembedding_matryoshka.models.shipped import locate
from flagembedding_matryoshka.text.pairs import PROMPT, PairTokenizer


class MatryoshkaModule(InputModule):
    """Packs pairs and scores them; nothing is padded.

    `CrossEncoder.predict` takes `cutoff_layers` (one), `compress_layers` and `compress_ratio` per call.
    """

    config_file_name = "matryoshka_config.json"
    config_keys = ["query_instruction", "passage_instruction", "prompt", "query_max_length", "max_length"]
    forward_kwargs = {"cutoff_layers", "compress_layers", "compress_ratio"}
    save_in_root = True
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        model: CostWiseMistralForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        query_instruction: str = "A: ",
        passage_instruction: str = "B: ",
        prompt: str = PROMPT,
        query_max_length: int | None = None,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.query_instruction = query_instruction
        self.passage_instruction = passage_instruction
        self.prompt = prompt
        self.query_max_length = query_max_length
        self.max_length = max_length

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Pairs of strings as {"pairs": a list of TokenizedPair}; `prompt` stands behind the passage."""
        if any(isinstance(text, str) for text in inputs):
            # A column alone, of which the trainer's model card counts the characters; it cannot be scored.
            return {"texts": inputs}
        tokenizer = PairTokenizer(self.tokenizer)
        prompt = self.prompt if prompt is None else prompt
        return {
            "pairs": tokenizer.build(
                [(self.query_instruction + query, self.passage_instruction + passage) for query, passage in inputs],
                prompt,
                self.query_max_length or self.max_length * 3 // 4,
                self.max_length,
                self.max_length + tokenizer.beside(prompt),
            )
        }

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
        sub_network = SubNetwork.resolve(self.model.config, cutoff_layers, compress_layers, compress_ratio)
        if len(sub_network.cutoff_layers) != 1:
            raise ValueError(
                f"a CrossEncoder has one score for a pair, got cutoff_layers={list(sub_network.cutoff_layers)}."
            )
        states = self.model.model.embed(*pack_pairs(features["pairs"], self.model.device))
        features["scores"] = self.model.scores(states, sub_network).T
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
            kwargs: what CrossEncoder gives to all modules; its `model_kwargs`, `processor_kwargs` and `config_kwargs`
                must be empty.

        Raises:
            ValueError: on such arguments, and if the directory is an adapter for one compression ratio alone, which
                cannot be merged.
        """
        refused = [name for name in ("model_kwargs", "processor_kwargs", "config_kwargs") if kwargs.get(name)]
        if refused or subfolder:
            raise ValueError(f"{refused or 'subfolder'}: a MatryoshkaModule is loaded without these.")
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
        model = load_model(checkpoint, tokenizer, torch.float32, **hub)
        model.config.raw_peft = []
        config = cls.load_config(
            resolve(locate(model_name_or_path), cache_folder),
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
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
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, int | float | str]]:
        """As `CrossEncoder.rank`.

        Args:
            options: of `predict`, as `cutoff_layers`, `compress_layers`, `compress_ratio` and `batch_size`.
        """
        scores = self.predict([(query, document) for document in documents], **options)
        order = sorted(range(len(documents)), key=lambda index: -float(scores[index]))
        return [
            {"corpus_id": index, "score": float(scores[index])}
            | ({"text": documents[index]} if return_documents else {})
            for index in order[:top_k]
        ]


def load_cross_encoder(path: str, **kwargs: Any) -> MatryoshkaCrossEncoder:
    """A CrossEncoder of "smollm2" or any checkpoint, whose `predict` gives what `compute_score` does: no sigmoid.

    What `export` and fine-tuning write, `CrossEncoder(path, trust_remote_code=True)` loads too: sentence-transformers
    imports modules of other packages only then. This needs none.

    Args:
        kwargs: of CrossEncoder, as `device`.
    """
    return MatryoshkaCrossEncoder(modules=[MatryoshkaModule.load(path)], **{"activation_fn": nn.Identity(), **kwargs})
