"""LangChain: `ContextualCompressionRetriever(base_compressor=MatryoshkaCompressor(path, top_n=5), …)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import PrivateAttr

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.ranking import Ranking


class MatryoshkaCompressor(BaseDocumentCompressor):
    """Keeps the best documents, the best first, with their score in `metadata["relevance_score"]`.

    Args:
        reranker: or the path of one.
        top_n: how many documents to keep; None is all.
        options: as in [`~flagembedding_matryoshka.integrations.ranking.Ranking`].
    """

    _ranking: Ranking = PrivateAttr()

    def __init__(self, reranker: MatryoshkaReranker | str, top_n: int | None = None, **options: Any) -> None:
        super().__init__()
        self._ranking = Ranking(reranker, top_n, options)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Copies of the best documents."""
        return [
            documents[index].model_copy(update={"metadata": documents[index].metadata | {"relevance_score": score}})
            for index, score in self._ranking(query, [document.page_content for document in documents])
        ]
