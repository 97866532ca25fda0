"""Retrievers of passages for queries: BM25 and a sentence-transformers bi-encoder, with exact search."""

from __future__ import annotations

import argparse
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from flagembedding_matryoshka.mining.digests import digest_model, digest_texts
from flagembedding_matryoshka.text.output import FileOutput

QUERIES_AT_ONCE = 1024
"""Number of queries that BM25 searches for at a time."""
SCORES_AT_ONCE = 2**26
"""Number of cosines that are in memory at a time."""
TEXTS_AT_ONCE = 4096
"""Number of texts that are encoded and stored at a time."""
ENCODER_OPTIONS = ("batch_size", "max_length", "device", "use_fp16", "use_bf16", "trust_remote_code")
Retriever = Callable[[Sequence[str], Sequence[str], int], Iterable[Sequence[int]]]
"""Takes passages, queries and k; yields, for each query, the indices of at most k passages, best first."""


def bm25_lists(texts: Sequence[str], queries: Sequence[str], k: int) -> Iterator[Sequence[int]]:
    """Yield, for each query, the indices of BM25's first k texts. A text that shares no word with it is left out.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
        ValueError: if no text has a word to index.
    """
    return map(list, bm25_scored_lists(texts, queries, k))


def bm25_scored_lists(texts: Sequence[str], queries: Sequence[str], k: int) -> Iterator[dict[int, float]]:
    """Yield {index of a text: BM25's score} for each query, best first, as `bm25_lists`."""
    index, tokenize = _bm25(texts)
    for start in tqdm(range(0, len(queries), QUERIES_AT_ONCE), desc="BM25", unit="batch", disable=None):
        indices, scores = index.retrieve(
            tokenize(queries[start : start + QUERIES_AT_ONCE]), k=min(k, len(texts)), show_progress=False
        )
        for row, values in zip(indices.tolist(), scores.tolist(), strict=True):
            yield {index: value for index, value in zip(row, values, strict=True) if value > 0}


def bm25_scorer(texts: Sequence[str]) -> Callable[[str], np.ndarray]:
    """Return a function from a query to BM25's scores of all texts, float32 (texts,).

    A text that shares no word with the query has the score 0.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
        ValueError: if no text has a word to index.
    """
    index, tokenize = _bm25(texts)

    def scores(query: str) -> np.ndarray:
        (words,) = tokenize([query], return_ids=False)
        return index.get_scores(words) if words else np.zeros(len(texts), dtype=np.float32)

    return scores


def _bm25(texts: Sequence[str]) -> tuple[Any, Callable[..., Any]]:
    """Return an index of texts and its tokenizer."""
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise ImportError("BM25 needs bm25s and PyStemmer: pip install flagembedding_matryoshka[mining]") from error
    stemmer, index = Stemmer.Stemmer("english"), bm25s.BM25()
    tokenize = partial(bm25s.tokenize, stopwords="en", stemmer=stemmer, show_progress=False)
    words = tokenize(texts)
    if not any(words.ids):
        raise ValueError(f"BM25 finds no word to index in {len(texts)} passages: they have only English stop words")
    index.index(words, show_progress=False)
    return index, tokenize


class BiEncoder:
    """Unit vectors of queries and passages. The model's own prompts for queries and documents are used.

    Args:
        model: name or path for sentence-transformers.
        batch_size: number of texts in a batch.
        max_length: tokens of a text; None is the model's own limit.
        device: None is the choice of sentence-transformers.
        use_fp16, use_bf16: compute in float16 or bfloat16. Vectors are float32 all the same.
        trust_remote_code: run code that comes with the model.
        stored: file to which `lists` appends vectors, so that a later run continues after them; None stores nothing.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 64,
        max_length: int | None = None,
        device: str | None = None,
        use_fp16: bool = False,
        use_bf16: bool = False,
        trust_remote_code: bool = False,
        stored: Path | None = None,
    ) -> None:
        from sentence_transformers import SentenceTransformer

        self.name, self.batch_size, self.stored = model, batch_size, stored
        dtype = torch.float16 if use_fp16 else torch.bfloat16 if use_bf16 else torch.float32
        self.model = SentenceTransformer(
            model, device=device, trust_remote_code=trust_remote_code, model_kwargs={"dtype": dtype}
        )
        self.settings = {
            "model": model,
            "max_length": max_length,
            "dtype": str(dtype).removeprefix("torch."),
            "trust_remote_code": trust_remote_code,
        }
        if max_length is not None:
            self.model.max_seq_length = max_length

    def queries(self, texts: Sequence[str], progress: bool = False) -> Tensor:
        """Return unit vectors of queries, (texts, width) float32, on the model's device.

        Args:
            progress: show a progress bar.

        Raises:
            ValueError: if a vector is not finite.
        """
        return self._vectors(self.model.encode_query, texts, progress)

    def passages(self, texts: Sequence[str], progress: bool = False) -> Tensor:
        """Return unit vectors of passages, as `queries`."""
        return self._vectors(self.model.encode_document, texts, progress)

    def lists(self, texts: Sequence[str], queries: Sequence[str], k: int) -> Iterator[Sequence[int]]:
        """Yield, for each query, the indices of the k texts with the highest cosine, best first, by exact search.

        Raises:
            ValueError: if a vector is not finite, or `stored` has vectors of other texts or of another model.
        """
        progress = sys.stderr.isatty()
        if self.stored is None:
            passages, questions = self.passages(texts, progress), self.queries(queries, progress)
        else:
            passages, questions = self._stored_vectors(self.stored, texts, queries, progress)
        blocks = questions.split(max(1, SCORES_AT_ONCE // len(texts)))
        for block in tqdm(blocks, desc=self.name, unit="block", disable=None):
            yield from (block @ passages.T).topk(min(k, len(texts))).indices.tolist()

    def _stored_vectors(
        self, path: Path, texts: Sequence[str], queries: Sequence[str], progress: bool
    ) -> tuple[Tensor, Tensor]:
        """Return vectors of passages and queries. Vectors that an earlier run has stored are not computed again."""
        settings = {"texts": digest_texts(texts), "queries": digest_texts(queries), "weights": digest_model(self.name)}
        output = FileOutput(path, settings | self.settings)
        done = sum(1 for _ in output.lines())
        done -= done % TEXTS_AT_ONCE if done < len(texts) else (done - len(texts)) % TEXTS_AT_ONCE
        output.keep(done)
        for first, some, encode in ((0, texts, self.passages), (len(texts), queries, self.queries)):
            for start in range(max(0, done - first), len(some), TEXTS_AT_ONCE):
                vectors = encode(some[start : start + TEXTS_AT_ONCE], progress)
                output.append(b64encode(vector.tobytes()).decode() for vector in vectors.cpu().numpy())
        found = np.stack([np.frombuffer(b64decode(line), dtype=np.float32) for line in output.lines()])
        passages, questions = torch.from_numpy(found).to(self.model.device).split([len(texts), len(queries)])
        return passages, questions

    def _vectors(self, encode: Callable[..., Tensor], texts: Sequence[str], progress: bool) -> Tensor:
        vectors = encode(list(texts), batch_size=self.batch_size, show_progress_bar=progress, convert_to_tensor=True)
        vectors = normalize(vectors.float(), dim=-1)
        if not vectors.isfinite().all():
            raise ValueError(f"{self.name} gives vectors that are not finite")
        return vectors


def best_ranks(lists: Sequence[Sequence[int]]) -> dict[int, int]:
    """Interleave lists and return {index: its best rank in any list, from 1}, in the order of the ranks."""
    ranks: dict[int, int] = {}
    for rank, indices in enumerate(zip_longest(*lists), start=1):
        for index in indices:
            if index is not None:
                ranks.setdefault(index, rank)
    return ranks


def vectors_path(output: Path) -> Path:
    """Return the path of the stored vectors of a command, which exist until its output is complete."""
    return output.with_name(f"{output.name}.vectors")


def add_retrievers(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the retrievers."""
    parser.add_argument(
        "--miner",
        choices=["bm25", "bi_encoder", "both"],
        default="bm25",
        help="retriever of the passages (default: %(default)s); both interleaves the two rankings",
    )
    parser.add_argument("--bi_encoder", help="name or path of a sentence-transformers model")
    encoder = parser.add_argument_group("bi-encoder", argument_default=argparse.SUPPRESS)
    encoder.add_argument("--batch_size", type=int, help="texts per batch (default: 64)")
    encoder.add_argument("--max_length", type=int, help="tokens of a text (default: the model's own limit)")
    encoder.add_argument("--device", help="such as cpu or cuda:0 (default: the choice of sentence-transformers)")
    encoder.add_argument("--use_fp16", action="store_true", help="encode in float16, for GPUs")
    encoder.add_argument("--use_bf16", action="store_true", help="encode in bfloat16, for devices that support it")
    encoder.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def make_retrievers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Callable[[], list[Retriever]]:
    """Return a function that loads the chosen retrievers.

    Contradicting options end the program here, before data is read. A bi-encoder's vectors are stored at
    `vectors_path(options.output)`.
    """
    given = {name: value for name, value in vars(options).items() if name in ENCODER_OPTIONS}
    if options.miner != "bm25" and options.bi_encoder is None:
        parser.error(f"--miner {options.miner} needs --bi_encoder")
    if options.miner == "bm25" and (given or options.bi_encoder is not None):
        parser.error(f"--{next(iter(given), 'bi_encoder')} is for --miner bi_encoder or both")

    def load() -> list[Retriever]:
        retrievers: list[Retriever] = [] if options.miner == "bi_encoder" else [bm25_lists]
        if options.miner != "bm25":
            retrievers.append(BiEncoder(options.bi_encoder, **given, stored=vectors_path(options.output)).lists)
        return retrievers

    return load
