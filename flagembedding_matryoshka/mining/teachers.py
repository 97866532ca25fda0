"""Teachers: functions that score pairs of query and passage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from sentence_transformers.util import get_device_name
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratios, use_token_adapter
from flagembedding_matryoshka.checkpoints.describing import MAX_LENGTH
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.checkpoints.shipped import locate
from flagembedding_matryoshka.mining.retrievers import BiEncoder, bm25_scorer
from flagembedding_matryoshka.models.packing import pack_pairs
from flagembedding_matryoshka.private import find_file
from flagembedding_matryoshka.setting import Layers, Setting
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair
from flagembedding_matryoshka.text.templates import Template

FLOATS_KEPT = 2**28
"""Number of floats of text vectors that a bi-encoder teacher keeps."""
Scorer = Callable[[list[tuple[str, str]]], Sequence[float] | np.ndarray]
"""Takes pairs of query and passage; returns one score for each."""


def flag_embedding_teacher(model: str, batch_size: int, max_length: int, device: str | None, **options: Any) -> Scorer:
    """Return a scorer: the raw scores of a FlagEmbedding re-ranker, which `FlagAutoReranker` finds by its name.

    Args:
        model: name or path.
        batch_size: pairs per batch.
        max_length: tokens of a pair.
        device: None is FlagEmbedding's choice.
        options: further arguments of `FlagAutoReranker.from_finetuned`, such as `model_class`.

    Raises:
        ValueError: if the name is unknown and `model_class` is missing, or the model has several labels.
    """
    from FlagEmbedding import FlagAutoReranker, FlagReranker

    reranker = FlagAutoReranker.from_finetuned(
        model, devices=device, batch_size=batch_size, max_length=max_length, normalize=False, **options
    )
    if isinstance(reranker, FlagReranker) and reranker.model.config.num_labels != 1:
        # FlagReranker would return the labels of the first pairs as the scores of all.
        raise ValueError(f"{model} has {reranker.model.config.num_labels} labels, but a re-ranker has one")
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
    indices = {text: index for index, text in enumerate(texts)}
    score = bm25_scorer(texts)

    def scores(pairs: list[tuple[str, str]]) -> np.ndarray:
        runs = groupby(pairs, key=itemgetter(0))
        return scale * np.concatenate([score(query)[[indices[text] for _, text in run]] for query, run in runs])

    return scores


def is_layer_wise(model: str) -> bool:
    """Return whether a checkpoint has exits: "smollm2", or one whose config.json says layer_wise."""
    place = locate(model)
    if find_file(place, CONFIG_NAME) is None:
        return False
    config, _ = PreTrainedConfig.get_config_dict(place)
    return bool(config.get("layer_wise"))


class StudentTeacher:
    """Raw scores of a layer-wise checkpoint at one exit and width, as `MatryoshkaReranker.compute_score` returns them.

    Neighbouring pairs of one query share its states, and batches have no padding.

    Args:
        model: "smollm2", or a layer-wise checkpoint, such as a directory that fine-tuning wrote.
        batch_size: pairs per batch.
        cutoff_layers: the exit; None is the deepest.
        compress_layers, compress_ratio: as in `MatryoshkaReranker`.
        max_length, query_max_length: tokens, as in `MatryoshkaReranker`; None is the checkpoint's own limit.
        device: None is the first accelerator, or the CPU if there is none.
        dtype: format of weights and products; scores are float32.
        trust_remote_code: as in transformers; it concerns the tokenizer only.

    Raises:
        ValueError: if the checkpoint has no such setting, before its weights are read.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 64,
        cutoff_layers: int | None = None,
        compress_layers: Layers = None,
        compress_ratio: int = 1,
        max_length: int | None = None,
        query_max_length: int | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        checkpoint = inspect_checkpoint(model, trust_remote_code=trust_remote_code)
        description = checkpoint.description
        description.check_scoring()
        self.setting = Setting.resolve(checkpoint.config, cutoff_layers, compress_layers, compress_ratio)
        self.batch_size = batch_size
        self.max_length = max_length or description.max_length.value or MAX_LENGTH
        self.query_max_length = query_max_length or description.query_max_length.value
        self.template = Template.load(checkpoint.config.template).with_instruction(None)
        tokenizer = load_tokenizer(model, trust_remote_code)
        self.tokenizer = PairTokenizer(tokenizer, self.template)
        loaded: Any = load_model(checkpoint, tokenizer, dtype, attach_token_adapters=True)
        self.model = loaded.to(device or get_device_name()).eval()
        if token_adapter_ratios(self.model):
            use_token_adapter(self.model, self.setting.compress_ratio)

    @torch.inference_mode()
    def __call__(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Return the scores of the pairs, (pairs,) float32."""
        scores = [
            self.model.scores(
                self.model.model.embed(*pack_pairs(batch, self.model.device), self.setting), self.setting
            )[0]
            for batch in self._batches(pairs)
        ]
        return torch.cat(scores).float().cpu().numpy()

    def _batches(self, pairs: list[tuple[str, str]]) -> Iterator[list[TokenizedPair]]:
        lengths = self.query_max_length, self.max_length
        for start in range(0, len(pairs), self.batch_size):
            yield self.tokenizer.build_within(pairs[start : start + self.batch_size], *lengths, self.template)
