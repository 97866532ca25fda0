"""Retrievers of passages for queries: BM25 and a sentence-transformers bi-encoder."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from flagembedding_matryoshka.inference.device import warn_of_slow_bfloat16
from flagembedding_matryoshka.mining.bm25 import BM25
from flagembedding_matryoshka.mining.digests import digest_model, digest_texts
from flagembedding_matryoshka.mining.pickles import ALLOW_PICKLE, BI_ENCODERS, refuse_pickled_modules

logger = logging.getLogger(__name__)

QUERIES_AT_ONCE = 1024
"""Number of queries that a bi-encoder encodes and searches for at a time."""
TEXTS_AT_ONCE = 4096
"""Number of texts that are encoded and stored at a time."""
EXACT_LIMIT = 1_000_000
"""Largest number of passages that are searched exactly. More are searched with an index."""
LISTS_PROBED = 64
"""Number of an index's lists that are searched for a query."""
SAMPLES_PER_LIST = 64
"""Number of vectors for each list of an index, that its centroids are trained with."""
ENCODER_OPTIONS = ("batch_size", "max_length", "device", "use_fp16", "use_bf16", "trust_remote_code", "allow_pickle")
Retriever = Callable[[Sequence[str], Sequence[str], int], Iterable[Sequence[int]]]
"""Takes passages, queries and k; yields, for each query, the indices of at most k passages, best first."""
Search = Callable[[Tensor, int], list[list[int]]]
"""Takes vectors of queries and k; returns, for each query, the indices of at most k passages, best first."""


def bm25_lists(texts: Sequence[str], queries: Sequence[str], k: int) -> Iterator[Sequence[int]]:
    """Yield, for each query, the indices of BM25's first k texts. A text that shares no word with it is left out.

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
        ValueError: if no text has a word to index.
    """
    return map(list, BM25(texts).lists(queries, k))


class BiEncoder:
    """Unit vectors of queries and passages. The model's own prompts for queries and documents are used.

    Args:
        model: name or path for sentence-transformers.
        batch_size: number of texts in a batch.
        max_length: tokens of a text; None is the model's own limit.
        device: None is the choice of sentence-transformers.
        use_fp16, use_bf16: compute in float16 or bfloat16. Vectors are float32 all the same.
        trust_remote_code: run code that comes with the model.
        allow_pickle: read weights from `pytorch_model.bin` if there are no safetensors. A pickle can run code.
        stored: directory where `lists` stores vectors of passages, for later runs; None stores nothing.

    Raises:
        ValueError: if weights are pickled and `allow_pickle` is False, before anything is loaded.
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
        allow_pickle: bool = False,
        stored: Path | None = None,
    ) -> None:
        from sentence_transformers import SentenceTransformer

        if not allow_pickle:
            refuse_pickled_modules(model, BI_ENCODERS)
        self.name, self.batch_size, self.max_length, self.stored = model, batch_size, max_length, stored
        dtype = torch.float16 if use_fp16 else torch.bfloat16 if use_bf16 else torch.float32
        self.model = SentenceTransformer(
            model,
            device=device,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": dtype, "use_safetensors": None if allow_pickle else True},
        )
        self.dtype = dtype
        warn_of_slow_bfloat16(dtype, self.model.device)
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
        """Yield, for each query, the indices of the k texts with the highest cosine, best first.

        Up to `EXACT_LIMIT` texts are searched exactly, more with an index.

        Raises:
            ImportError: if an index is needed and faiss is not installed.
            ValueError: if a vector is not finite.
        """
        progress = sys.stderr.isatty()
        if len(texts) > EXACT_LIMIT:
            _import_faiss()
        vectors = self.passages(texts, progress) if self.stored is None else self._stored_passages(self.stored, texts)
        search = exact_search(vectors) if len(texts) <= EXACT_LIMIT else index_search(vectors)
        for start in tqdm(range(0, len(queries), QUERIES_AT_ONCE), desc=self.name, unit="batch", disable=None):
            yield from search(self.queries(queries[start : start + QUERIES_AT_ONCE]), k)

    def _stored_passages(self, directory: Path, texts: Sequence[str]) -> Tensor:
        """Return vectors of passages from a file that is mapped into memory. Those that it lacks are computed.

        The file's name has the digest of texts and model. Other processes wait until the file is complete.
        """
        conditions = {
            "texts": digest_texts(texts),
            "model": self.name,
            "weights": digest_model(self.name),
            "max_length": self.max_length,
            "dtype": str(self.dtype),
        }
        digest = hashlib.sha256(json.dumps(conditions).encode()).hexdigest()
        path = directory / f"passages-{digest[:32]}.f32"
        width = int(self.model.get_embedding_dimension() or self.passages([""]).shape[1])
        size = 4 * width
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"), path.open("ab") as file:
            done = file.tell() // size
            done -= done % TEXTS_AT_ONCE if done < len(texts) else 0
            file.truncate(done * size)
            if done:
                logger.info("%s has the vectors of %d of %d passages", path, done, len(texts))
            for start in tqdm(range(done, len(texts), TEXTS_AT_ONCE), desc=self.name, unit="batch", disable=None):
                file.write(self.passages(texts[start : start + TEXTS_AT_ONCE]).cpu().numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
        return torch.from_numpy(np.memmap(path, np.float32, mode="c", shape=(len(texts), width))).to(self.model.device)

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


def exact_search(vectors: Tensor) -> Search:
    """Return the exact search of vectors by their inner product with a query's.

    Args:
        vectors: (texts, width) float32.
    """
    from sentence_transformers.util import dot_score, semantic_search

    def search(queries: Tensor, k: int) -> list[list[int]]:
        hits = semantic_search(queries, vectors, top_k=k, score_function=dot_score)
        return [[int(hit["corpus_id"]) for hit in row] for row in hits]

    return search


def index_search(vectors: Tensor) -> Search:
    """Return an approximate search of vectors by their inner product with a query's.

    The index is an inverted file of 4 √n lists (Jégou et al., TPAMI 2011) with vectors in float16.

    Args:
        vectors: (texts, width) float32.

    Raises:
        ImportError: if faiss is not installed.
    """
    faiss = _import_faiss()
    rows = vectors.cpu().numpy()
    count = max(1, int(4 * math.sqrt(len(rows))))
    index = faiss.index_factory(rows.shape[1], f"IVF{count},SQfp16", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(len(rows))[: SAMPLES_PER_LIST * count]
    index.train(rows[np.sort(sample)])
    for start in tqdm(range(0, len(rows), TEXTS_AT_ONCE), desc="index", unit="batch", disable=None):
        index.add(rows[start : start + TEXTS_AT_ONCE])
    index.nprobe = min(LISTS_PROBED, count)

    def search(queries: Tensor, k: int) -> list[list[int]]:
        _, found = index.search(queries.cpu().numpy(), min(k, len(rows)))
        return [[place for place in row if place >= 0] for row in found.tolist()]

    return search


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"more than {EXACT_LIMIT:,} passages need an index: pip install flagembedding_matryoshka[index]"
        ) from error
    return faiss


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
    encoder.add_argument("--allow_pickle", action="store_true", help=ALLOW_PICKLE)
    encoder.add_argument(
        "--vectors",
        type=Path,
        metavar="DIR",
        help="directory that keeps the passages' vectors, for other runs and shards (default: OUTPUT.vectors, which is "
        "removed when OUTPUT is complete)",
    )


@dataclass(frozen=True)
class Retrieval:
    """The retrievers that the options of a command choose.

    Attributes:
        miner: "bm25", "bi_encoder" or "both".
        bi_encoder: name or path of the bi-encoder; None for "bm25".
        encoder_options: further arguments of `BiEncoder`.
        vectors: directory of the passages' vectors.
        keeps_vectors: whether the directory stays when the output is complete.
    """

    miner: str
    bi_encoder: str | None
    encoder_options: dict[str, Any]
    vectors: Path
    keeps_vectors: bool

    def load(self) -> list[Retriever]:
        """Load the retrievers."""
        retrievers: list[Retriever] = [] if self.miner == "bi_encoder" else [bm25_lists]
        if self.bi_encoder is not None:
            retrievers.append(BiEncoder(self.bi_encoder, **self.encoder_options, stored=self.vectors).lists)
        return retrievers

    def conditions(self) -> dict[str, Any]:
        """Return all conditions of the lists. Those that change only rounding or what may be read are left out."""
        unconditional = ("batch_size", "device", "allow_pickle")
        options = {name: value for name, value in self.encoder_options.items() if name not in unconditional}
        weights = None if self.bi_encoder is None else digest_model(self.bi_encoder)
        return {"miner": self.miner, "bi_encoder": self.bi_encoder, "weights": weights, **options}

    def finish(self) -> None:
        """Remove the vectors, unless they are to be kept."""
        if not self.keeps_vectors:
            shutil.rmtree(self.vectors, ignore_errors=True)


def choose_retrieval(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Retrieval:
    """Return the retrievers that options choose. Contradicting options end the program."""
    given = {name: value for name, value in vars(options).items() if name in (*ENCODER_OPTIONS, "vectors")}
    if options.miner != "bm25" and options.bi_encoder is None:
        parser.error(f"--miner {options.miner} needs --bi_encoder")
    if options.miner == "bm25" and (given or options.bi_encoder is not None):
        parser.error(f"--{next(iter(given), 'bi_encoder')} is for --miner bi_encoder or both")
    vectors = given.pop("vectors", None)
    beside = options.output.with_name(f"{options.output.name}.vectors")
    return Retrieval(options.miner, options.bi_encoder, given, vectors or beside, vectors is not None)
