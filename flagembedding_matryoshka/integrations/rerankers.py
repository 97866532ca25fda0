"""AnswerDotAI's rerankers: importing this module enables `Reranker(…, model_type="MatryoshkaLayerWiseRanker")`."""

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
from flagembedding_matryoshka.integrations.adapter import NONE, RankingAdapter

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class MatryoshkaLayerWiseRanker(BaseRanker):
    """Rank documents by the interface of `rerankers`.

    Its documents have no field for a first stage's scores. `rank` takes these scores, or `first_stage_key` names the
    metadata that holds them. With fusion a result's score is the fused score, and its metadata have "reranker_score"
    and "first_stage_score".

    Args:
        model_name_or_path: a re-ranker, or the path of one.
        verbose: 0 shows no progress bar.
        dtype: as in `MatryoshkaReranker`, or "fp16", "bf16" or "fp32"; only with a path.
        max_sequence_length: `rerankers`' name of `max_length`.
        options: as in [`~flagembedding_matryoshka.integrations.adapter.RankingAdapter`].
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
        self._ranking = RankingAdapter(
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
        first_stage_scores: Sequence[float | None] | None = None,
        first_stage: str | None = None,
        fusion: float | str | None = None,
    ) -> RankedResults:
        """Rank all documents, best first. With a cascade or a deadline results are ordered by rank, not by score.

        Args:
            instruction: None is the ranker's own instruction, "" is none.
            first_stage_scores: for each document the first stage's score, or None if it did not find the document.
                They replace the scores that `first_stage_key` names. None is no such list.
            first_stage: "order" for documents in the first stage's order, "none" for no fusion; None is the ranker's
                own value.
            fusion: weight of the first stage's scores; None is the ranker's own weight.

        Raises:
            TypeError: if a document has no text, such as an image, or as `MatryoshkaReranker.rank`.
            ValueError: if the number of ids or metadata is not that of documents, or as `MatryoshkaReranker.rank`.
        """
        documents = _documents(docs, doc_ids, metadata)
        found = self._ranking(
            query,
            [document.text for document in documents],
            [document.metadata for document in documents],
            batch_size=batch_size,
            max_length=max_sequence_length,
            instruction=instruction,
            first_stage_scores=first_stage_scores,
            first_stage=first_stage,
            fusion=fusion,
        )
        for hit in found:
            documents[hit.index].metadata = documents[hit.index].metadata | hit.metadata
        results = [Result(documents[hit.index], hit.score, rank) for rank, hit in enumerate(found, start=1)]
        return RankedResults(results, query, has_scores=all(hit.cutoff_layer is None for hit in found))

    def score(self, query: str, doc: str) -> float:
        """Return the re-ranker's own score of one document, even with a default of `fusion`."""
        (hit,) = self._ranking(query, [doc], score_threshold=-inf, first_stage=NONE)
        return hit.score


def _documents(docs: Any, doc_ids: Sequence[Any] | None, metadata: Sequence[dict[str, Any]] | None) -> list[Document]:
    """Copy documents, with ids and metadata. The library's `prep_docs` fails for an empty list."""
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
