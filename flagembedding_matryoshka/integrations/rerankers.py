"""AnswerDotAI's rerankers: once this is imported, `Reranker(path, model_type="MatryoshkaLayerWiseRanker")` is ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rerankers.documents import Document
from rerankers.models import AVAILABLE_RANKERS
from rerankers.models.ranker import BaseRanker
from rerankers.results import RankedResults, Result
from rerankers.utils import prep_docs

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.ranking import Ranking


class MatryoshkaLayerWiseRanker(BaseRanker):
    """Ranks as every `rerankers` model.

    Args:
        model_name_or_path: a path, or a re-ranker.
        verbose: 0 shows no progress bar.
        options: as in [`~flagembedding_matryoshka.integrations.ranking.Ranking`].
    """

    def __init__(self, model_name_or_path: MatryoshkaReranker | str, verbose: int = 1, **options: Any) -> None:
        self._ranking = Ranking(model_name_or_path, None, {"show_progress_bar": None if verbose else False} | options)

    def rank(
        self,
        query: str,
        docs: str | Document | Sequence[str] | Sequence[Document],
        doc_ids: Sequence[str] | Sequence[int] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
    ) -> RankedResults:
        """All documents, the best first. With a cascade, ranks and not scores say their order."""
        documents = prep_docs(docs, doc_ids, metadata)
        found = self._ranking(query, [document.text for document in documents])
        results = [Result(documents[index], score, rank) for rank, (index, score) in enumerate(found, start=1)]
        return RankedResults(results, query, has_scores="cascade" not in self._ranking.options)

    def score(self, query: str, doc: str) -> float:
        """The score of one document."""
        ((_, score),) = self._ranking(query, [doc])
        return score


AVAILABLE_RANKERS["MatryoshkaLayerWiseRanker"] = MatryoshkaLayerWiseRanker
