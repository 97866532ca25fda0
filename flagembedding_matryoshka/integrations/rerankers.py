"""AnswerDotAI's rerankers: once this is imported, `Reranker(path, model_type="MatryoshkaLayerWiseRanker")` is ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from os import PathLike
from typing import Any

import torch
from rerankers.documents import Document
from rerankers.models import AVAILABLE_RANKERS
from rerankers.models.ranker import BaseRanker
from rerankers.results import RankedResults, Result

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.ranking import Ranking

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class MatryoshkaLayerWiseRanker(BaseRanker):
    """Ranks as every `rerankers` model.

    Args:
        model_name_or_path: a path, or a re-ranker.
        verbose: 0 shows no progress bar.
        dtype: as of `MatryoshkaReranker`, or "fp16", "bf16" or "fp32"; with a path.
        max_sequence_length: the name that `rerankers` has for `max_length`.
        options: as in [`~flagembedding_matryoshka.integrations.ranking.Ranking`].
    """

    def __init__(
        self,
        model_name_or_path: MatryoshkaReranker | str | PathLike[str],
        verbose: int = 1,
        dtype: str | torch.dtype | None = None,
        max_sequence_length: int | None = None,
        **options: Any,
    ) -> None:
        if max_sequence_length is not None:
            if options.get("max_length") is not None:
                raise ValueError(
                    f"max_sequence_length={max_sequence_length} and max_length={options['max_length']}: give one."
                )
            options = options | {"max_length": max_sequence_length}
        if isinstance(dtype, str):
            dtype = DTYPES.get(dtype, dtype)
        self._ranking = Ranking(
            model_name_or_path, dtype=dtype, **{"show_progress_bar": None if verbose else False} | options
        )
        self._ranking.check()

    def rank(
        self,
        query: str,
        docs: str | Document | Iterable[str] | Iterable[Document],
        doc_ids: Sequence[str] | Sequence[int] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        batch_size: int | None = None,
        max_sequence_length: int | None = None,
        instruction: str | None = None,
    ) -> RankedResults:
        """All documents, the best first. With a cascade, ranks and not scores say their order.

        Args:
            instruction: None is the ranker's own, "" is none.

        Raises:
            TypeError: if a document has no text, as an image.
            ValueError: if there are not as many ids or metadata as documents.
        """
        documents = _documents(docs, doc_ids, metadata)
        found = self._ranking(
            query,
            [document.text for document in documents],
            [document.metadata for document in documents],
            batch_size=batch_size,
            max_length=max_sequence_length,
            instruction=instruction,
        )
        results = [Result(documents[index], score, rank) for rank, (index, score) in enumerate(found, start=1)]
        return RankedResults(results, query, has_scores="cascade" not in self._ranking.given)

    def score(self, query: str, doc: str) -> float:
        """The score of one document."""
        ((_, score),) = self._ranking(query, [doc], score_threshold=-inf)
        return score


def _documents(docs: Any, doc_ids: Sequence[Any] | None, metadata: Sequence[dict[str, Any]] | None) -> list[Document]:
    """Documents of our own, with ids and metadata; the library's own `prep_docs` fails where there are none."""
    given = [docs] if isinstance(docs, str | Document) else list(docs)
    for name, values in (("doc_ids", doc_ids), ("metadata", metadata)):
        if values is not None and len(values) != len(given):
            raise ValueError(f"{len(given)} documents need as many {name}, got {len(values)}.")
    found = []
    for place, doc in enumerate(given):
        known = doc if isinstance(doc, Document) else Document("", None)
        text = doc.text if isinstance(doc, Document) else doc
        if not isinstance(text, str):
            raise TypeError(f"document {place} has no text to rank, got {doc!r}.")
        own_id = place if known.doc_id is None else known.doc_id
        found.append(
            Document(
                text,
                own_id if doc_ids is None else doc_ids[place],
                known.metadata if metadata is None else metadata[place],
                known.document_type,
                known.image_path,
                known.base64,
            )
        )
    return found


AVAILABLE_RANKERS["MatryoshkaLayerWiseRanker"] = MatryoshkaLayerWiseRanker
