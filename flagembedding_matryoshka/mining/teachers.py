"""Teachers: functions that score pairs of query and passage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from flagembedding_matryoshka.checkpoints.gguf import locate
from flagembedding_matryoshka.inference.device import warn_of_slow_bfloat16
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.mining.bm25 import BM25
from flagembedding_matryoshka.mining.pickles import CROSS_ENCODERS, refuse_pickled_modules
from flagembedding_matryoshka.mining.retrievers import BiEncoder
from flagembedding_matryoshka.private import find_file
from flagembedding_matryoshka.setting import Layers

FLOATS_KEPT = 2**28
"""Number of floats of text vectors that a bi-encoder teacher keeps."""
Scorer = Callable[[list[tuple[str, str]]], Sequence[float] | np.ndarray]
"""Takes pairs of query and passage; returns one score for each."""


def flag_embedding_teacher(
    model: str, batch_size: int, max_length: int, device: str | None, allow_pickle: bool = False, **options: Any
) -> Scorer:
    """Return a scorer: the raw scores of a FlagEmbedding re-ranker, which `FlagAutoReranker` finds by its name.

    Args:
        model: name or path.
        batch_size: pairs per batch.
        max_length: tokens of a pair.
        device: None is FlagEmbedding's choice.
        allow_pickle: as in `BiEncoder`.
        options: further arguments of `FlagAutoReranker.from_finetuned`, such as `model_class`.

    Raises:
        ValueError: if the name is unknown and `model_class` is missing, or the model has several labels. Also, before
            anything is loaded, if its weights are pickled and `allow_pickle` is False.
    """
    from FlagEmbedding import FlagAutoReranker, FlagReranker

    if not allow_pickle:
        refuse_pickled_modules(model)
    reranker = FlagAutoReranker.from_finetuned(
        model, devices=device, batch_size=batch_size, max_length=max_length, normalize=False, **options
    )
    if isinstance(reranker, FlagReranker) and reranker.model.config.num_labels != 1:
        # FlagReranker would return the labels of the first pairs as the scores of all.
        raise ValueError(f"{model} has {reranker.model.config.num_labels} labels, but a re-ranker has one")
    return reranker.compute_score


def matryoshka_teacher(
    model: str,
    batch_size: int = 64,
    max_length: int | None = None,
    query_max_length: int | None = None,
    device: str | None = None,
    use_fp16: bool = False,
    use_bf16: bool = False,
    trust_remote_code: bool = False,
    scale: float = 1.0,
    cutoff_layers: int | None = None,
    compress_layers: Layers = None,
    compress_ratio: int = 1,
    allow_pickle: bool = False,
) -> Scorer:
    """Return a scorer: `scale` times the raw scores of a re-ranker that `MatryoshkaReranker` loads.

    Args:
        model: a layer-wise checkpoint, such as "smollm2" or a directory that fine-tuning wrote, or a raw one.
        batch_size: pairs per batch.
        max_length, query_max_length: tokens, as in `MatryoshkaReranker`; None is the checkpoint's own limit.
        device: None is the first accelerator, or the CPU if there is none.
        use_fp16, use_bf16: score in float16 or bfloat16; default float32.
        trust_remote_code: as in transformers; it concerns the tokenizer only.
        scale: factor of the scores.
        cutoff_layers: the exit; None is the deepest.
        compress_layers, compress_ratio: the width, as in `MatryoshkaReranker`.
        allow_pickle: read weights from `pytorch_model.bin` and `adapter_model.bin` if there are no safetensors.

    Raises:
        ValueError: if the checkpoint has no such setting, or its weights are pickled and `allow_pickle` is False,
            before its weights are read.
    """
    reranker = MatryoshkaReranker(
        model,
        dtype=_dtype(use_fp16, use_bf16),
        devices=device,
        batch_size=batch_size,
        max_length=max_length,
        query_max_length=query_max_length,
        trust_remote_code=trust_remote_code,
        cutoff_layers=cutoff_layers,
        compress_layers=compress_layers,
        compress_ratio=compress_ratio,
        allow_pickle=allow_pickle,
    )
    return lambda pairs: scale * np.array(reranker.compute_score(pairs, show_progress_bar=False))


def cross_encoder_teacher(
    model: str,
    batch_size: int = 64,
    max_length: int | None = None,
    device: str | None = None,
    use_fp16: bool = False,
    use_bf16: bool = False,
    trust_remote_code: bool = False,
    scale: float = 1.0,
    allow_pickle: bool = False,
    **setting: Any,
) -> Scorer:
    """Return a scorer: `scale` times the raw scores of a cross-encoder, without a sigmoid.

    Args:
        model: a layer-wise checkpoint, scored by `matryoshka_teacher`, or a model for sentence-transformers'
            `CrossEncoder`.
        batch_size: pairs per batch.
        max_length: tokens of a pair; None is 512, or a layer-wise checkpoint's own limit.
        device: None is the first accelerator, or the CPU if there is none.
        use_fp16, use_bf16: score in float16 or bfloat16; default float32.
        trust_remote_code: run code that comes with the model.
        scale: factor of the scores.
        allow_pickle: as in `BiEncoder`.
        setting: for a layer-wise checkpoint: `cutoff_layers`, `compress_layers`, `compress_ratio`, `query_max_length`.

    Raises:
        ValueError: if `setting` is given for a model without exits, or the checkpoint has no such setting. Also,
            before anything is loaded, if weights are pickled and `allow_pickle` is False.
    """
    if is_layer_wise(model):
        return matryoshka_teacher(
            model,
            batch_size,
            max_length,
            device=device,
            use_fp16=use_fp16,
            use_bf16=use_bf16,
            trust_remote_code=trust_remote_code,
            scale=scale,
            allow_pickle=allow_pickle,
            **setting,
        )
    given = {name: value for name, value in setting.items() if value not in (None, 1)}
    if given:
        raise ValueError(f"{model} is not a layer-wise checkpoint and has no exits and widths: leave out {given}.")
    from sentence_transformers import CrossEncoder

    if not allow_pickle:
        refuse_pickled_modules(model, CROSS_ENCODERS)
    dtype = _dtype(use_fp16, use_bf16)
    encoder = CrossEncoder(
        model,
        max_length=max_length or 512,
        device=device,
        trust_remote_code=trust_remote_code,
        activation_fn=torch.nn.Identity(),
        model_kwargs={"dtype": dtype, "use_safetensors": None if allow_pickle else True},
    )
    warn_of_slow_bfloat16(dtype, encoder.model.device)
    return lambda pairs: scale * np.asarray(encoder.predict(pairs, batch_size=batch_size, show_progress_bar=False))


def _dtype(use_fp16: bool, use_bf16: bool) -> torch.dtype:
    return torch.float16 if use_fp16 else torch.bfloat16 if use_bf16 else torch.float32


def bi_encoder_teacher(model: str, scale: float, **options: Any) -> Scorer:
    """Return a scorer: `scale` times the cosine of a `BiEncoder`'s vectors. The vectors of recent texts are kept.

    Args:
        model: name or path for sentence-transformers.
        scale: factor of the cosines.
        options: further arguments of `BiEncoder`.
    """
    encoder = BiEncoder(model, **options)
    queries, passages = _VectorCache(encoder.queries), _VectorCache(encoder.passages)

    def scores(pairs: list[tuple[str, str]]) -> np.ndarray:
        questions, texts = zip(*pairs, strict=True)
        return scale * np.einsum("ij,ij->i", queries(questions), passages(texts))

    return scores


class _VectorCache:
    """Vectors of texts. The last ones that were encoded are kept, FLOATS_KEPT floats in all."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor]) -> None:
        self.encode = encode
        self.vectors: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        if new:
            self.vectors.update(zip(new, self.encode(new).cpu().numpy(), strict=True))
        found = np.stack([self.vectors[text] for text in texts])
        too_many = len(self.vectors) - FLOATS_KEPT // found.shape[1]
        for text in list(islice(self.vectors, max(0, too_many))):
            del self.vectors[text]
        return found


def bm25_teacher(texts: Sequence[str], scale: float) -> Scorer:
    """Return a scorer: `scale` times BM25's score of a passage.

    Args:
        texts: the corpus, which includes every passage that is scored.
        scale: factor of the scores.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
    """
    places = {text: place for place, text in enumerate(texts)}
    index = BM25(texts)

    def scores(pairs: list[tuple[str, str]]) -> np.ndarray:
        return scale * index.pair_scores([query for query, _ in pairs], [places[text] for _, text in pairs])

    return scores


def is_layer_wise(model: str) -> bool:
    """Return whether a checkpoint has exits: "smollm2", or one whose config.json says layer_wise."""
    place = locate(model)
    if find_file(place, CONFIG_NAME) is None:
        return False
    config, _ = PreTrainedConfig.get_config_dict(place)
    return bool(config.get("layer_wise"))
