"""What the worker thread computes: documents of many requests in one call of the re-ranker."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from flagembedding_matryoshka.inference.chunking import CutDocument
from flagembedding_matryoshka.inference.counting import count_input_tokens
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.inference.scoring import Hit, best_chunks
from flagembedding_matryoshka.serve.shortening import Lengths, shorten
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import TokenizedPair


@dataclass(frozen=True)
class Work:
    """What a request runs. Those of equal settings can share a batch.

    Attributes:
        pairs: documents, or their chunks, as the model reads them, all of one query.
        shared_tokens, tokens: see `MatryoshkaReranker.count_tokens`.
        cut: the chunks of each document, if the request wants them.
    """

    setting: Setting
    pairs: Sequence[TokenizedPair]
    shared_tokens: int
    tokens: Sequence[int]
    cut: Sequence[CutDocument] | None = None

    def hits(self, found: Sequence[Hit]) -> Sequence[Hit]:
        """Of each document, from those of `pairs`."""
        return found if self.cut is None else best_chunks(found, self.cut)

    @property
    def all_tokens(self) -> int:
        return self.shared_tokens + sum(self.tokens)


class Scorer:
    """A re-ranker as the server uses it."""

    def __init__(self, reranker: MatryoshkaReranker) -> None:
        self.reranker = reranker

    @property
    def max_tokens(self) -> int:
        """That one call spreads over the devices in one pass on each."""
        return self.reranker.max_tokens_per_batch * len(self.reranker.target_devices)

    def prepare(
        self,
        query: str,
        documents: Sequence[str],
        asked: Mapping[str, Any],
        lengths: Lengths,
        chunks: Mapping[str, Any] | None = None,
    ) -> Work:
        """What scoring these documents runs. The model does not run.

        Args:
            asked: arguments of `MatryoshkaReranker.setting`.
            chunks: arguments of `MatryoshkaReranker.cut_chunks`; None is no chunks.

        Raises:
            TypeError, ValueError: if the setting does not fit the model, the query leaves no room for a document, or as
                `shorten`.
        """
        setting = self.reranker.setting(**asked)
        query, texts = shorten(self.reranker, query, documents, lengths)
        if chunks is None:
            pairs = self.reranker.tokenize([(query, text) for text in texts])
            return Work(setting, pairs, *count_input_tokens(pairs))
        cut = self.reranker.cut_chunks(query, texts, **chunks)
        pairs = [chunk.pair for document in cut for chunk in document.chunks]
        return Work(setting, pairs, *count_input_tokens(pairs), cut)

    def count_operations(self, work: Work, hits: Sequence[Mapping[str, Any]]) -> int:
        """See `MatryoshkaReranker.estimate_flops`: as if no other request had shared the batch.

        Args:
            hits: what `compute` found for it.
        """
        setting = work.setting
        if not setting.cascade:
            return self.reranker.estimate_flops(work.pairs, **setting.arguments)
        exits = [*dict(setting.cascade), setting.depth]
        depths = [hit["cutoff_layer"] for hit in hits]
        return self.reranker.estimate_flops(work.pairs, depths, **setting.arguments | {"cutoff_layers": exits})

    def compute(
        self, setting: Setting, shares: list[Sequence[TokenizedPair]], between: Callable[[], None]
    ) -> list[list[dict[str, Any]]]:
        """Score the documents of each request.

        Args:
            between: called between a cascade's batches. What it raises ends the call.

        Returns:
            for each a dict with "score", not normalised, with a cascade "cutoff_layer", and "is_truncated" if it is.

        Raises:
            ArithmeticError: if a score is not a finite number.
            torch.OutOfMemoryError: if a single pair does not fit into memory.
        """
        with self.reranker.calling_between_batches(between):
            found = self.reranker.score_lists(
                shares, cascade=dict(setting.cascade) or None, show_progress_bar=False, **setting.arguments
            )
        for hit in chain(*found):
            if not math.isfinite(hit["score"]):
                raise ArithmeticError(f"a score is {hit['score']}")
        return found
