"""Teachers: what gives scores to pairs of a query and a passage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flagembedding_matryoshka.finetune.bi_encoder import BiEncoder
from flagembedding_matryoshka.finetune.student_teacher import StudentTeacher, is_layer_wise
from flagembedding_matryoshka.text.collections import bm25_scorer

FLOATS_KEPT = 2**28
Scorer = Callable[[list[tuple[str, str]]], Sequence[float] | np.ndarray]


def flag_embedding_teacher(model: str, batch_size: int, max_length: int, device: str | None, **options: Any) -> Scorer:
    """Raw scores of a FlagEmbedding re-ranker, found by its name as `FlagAutoReranker` does.

    Args:
        options: further arguments of `FlagAutoReranker.from_finetuned`, such as `model_class`.

    Raises:
        ValueError: if the name says nothing and `model_class` is missing, or the model has several labels.
    """
    from FlagEmbedding import FlagAutoReranker, FlagReranker

    reranker = FlagAutoReranker.from_finetuned(
        model, devices=device, batch_size=batch_size, max_length=max_length, normalize=False, **options
    )
    if isinstance(reranker, FlagReranker) and reranker.model.config.num_labels != 1:
        # FlagReranker would take the labels of the first pairs for the scores of all.
        raise ValueError(f"{model} has {reranker.model.config.num_labels} labels: a re-ranker has one")
    return reranker.compute_score


def cross_encoder_teacher(
    model: str,
    batch_size: int = 64,
    max_length: int | None = None,
    device: str | None = None,
    use_fp16: bool = False,
    use_bf16: bool = False,
    trust_remote_code: bool = False,
    scale: float = 1.0,
    **student: Any,
) -> Scorer:
    """Return a scorer: `scale` times the raw scores of a cross-encoder, without a sigmoid.

    Args:
        model: a layer-wise checkpoint, scored by `StudentTeacher`, or a model for sentence-transformers'
            `CrossEncoder`.
        batch_size: pairs per batch.
        max_length: tokens of a pair; None is 512, or a layer-wise checkpoint's own limit.
        device: None is the first accelerator, or the CPU if there is none.
        use_fp16, use_bf16: score in float16 or bfloat16; default float32.
        trust_remote_code: run code that comes with the model.
        scale: factor of the scores.
        student: for a layer-wise checkpoint: `cutoff_layers`, `compress_layers`, `compress_ratio`, `query_max_length`.

    Raises:
        ValueError: if `student` is given for a model without exits, or the checkpoint has no such setting.
    """
    dtype = torch.float16 if use_fp16 else torch.bfloat16 if use_bf16 else torch.float32
    score: Scorer
    if is_layer_wise(model):
        score = StudentTeacher(
            model,
            batch_size=batch_size,
            max_length=max_length,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **student,
        )
    else:
        given = {name: value for name, value in student.items() if value not in (None, 1)}
        if given:
            raise ValueError(f"{model} is not a layer-wise checkpoint and has no exits and widths: leave out {given}.")
        from sentence_transformers import CrossEncoder

        encoder = CrossEncoder(
            model,
            max_length=max_length or 512,
            device=device,
            trust_remote_code=trust_remote_code,
            activation_fn=torch.nn.Identity(),
            model_kwargs={"dtype": dtype},
        )

        def score(pairs: list[tuple[str, str]]) -> np.ndarray:
            return encoder.predict(pairs, batch_size=batch_size, show_progress_bar=False)

    return lambda pairs: scale * np.asarray(score(pairs))


def bi_encoder_teacher(model: str, scale: float, **options: Any) -> Scorer:
    """`scale` times the cosine of a `BiEncoder`'s vectors; texts that come again soon are not encoded again.

    Args:
        options: further arguments of `BiEncoder`.
    """
    encoder = BiEncoder(model, **options)
    queries, passages = _Remembered(encoder.queries), _Remembered(encoder.passages)

    def scores(pairs: list[tuple[str, str]]) -> np.ndarray:
        questions, texts = zip(*pairs, strict=True)
        return scale * np.einsum("ij,ij->i", queries(questions), passages(texts))

    return scores


class _Remembered:
    """Vectors of texts, of which the last that were encoded are kept, FLOATS_KEPT numbers in all."""

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
    """`scale` times BM25's score of a passage, one of `texts`, among all of them.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
    """
    places = {text: place for place, text in enumerate(texts)}
    score = bm25_scorer(texts)

    def scores(pairs: list[tuple[str, str]]) -> np.ndarray:
        runs = groupby(pairs, key=itemgetter(0))
        return scale * np.concatenate([score(query)[[places[text] for _, text in run]] for query, run in runs])

    return scores
