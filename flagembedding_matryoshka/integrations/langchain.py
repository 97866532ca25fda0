"""LangChain: `ContextualCompressionRetriever(base_compressor=MatryoshkaCompressor(path, top_n=5), …)`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.load import Serializable
from pydantic import PrivateAttr

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.adapter import RankingAdapter


class MatryoshkaCompressor(Serializable, BaseDocumentCompressor):
    """Rank documents, best first, with their score in `metadata["relevance_score"]`.

    LangChain has no field for the first stage's scores. `first_stage_key` names the metadata that holds them, such as
    "score". Without it and without `first_stage="order"` nothing is fused. With fusion "relevance_score" is the fused
    score, "reranker_score" the re-ranker's score and "first_stage_score" the first stage's score.

    LangChain's `dumps` writes a compressor that was made from a path, and the name of a secret, HF_TOKEN, instead of a
    token. `loads` needs `allowed_objects=[MatryoshkaCompressor]` and `valid_namespaces=["flagembedding_matryoshka"]`.

    Args:
        reranker: a re-ranker, or the path of one.
        top_n: most documents to return; None is all. It can be changed later.
        options: as in [`~flagembedding_matryoshka.integrations.adapter.RankingAdapter`].
    """

    top_n: int | None = None
    _ranking: RankingAdapter = PrivateAttr()

    def __init__(
        self, reranker: MatryoshkaReranker | str | PathLike[str], top_n: int | None = None, **options: Any
    ) -> None:
        super().__init__(**{"top_n": top_n})
        self._ranking = RankingAdapter(reranker, **options)
        self._ranking.check(top_n, has_scores=False)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        return self._ranking.arguments()

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"token": "HF_TOKEN"} if isinstance(self._ranking.given.get("token"), str) else {}

    def to_json(self) -> Any:
        """Return LangChain's form of the constructor's call. A loaded re-ranker has the form of an object not saved."""
        return super().to_json() if self._ranking.is_from_path else self.to_json_not_implemented()

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return copies of the best documents."""
        contents, metadata = [doc.page_content for doc in documents], [doc.metadata for doc in documents]
        return [
            documents[hit.index].model_copy(
                update={"metadata": documents[hit.index].metadata | {"relevance_score": hit.score} | hit.metadata}
            )
            for hit in self._ranking(query, contents, metadata, self.top_n)
        ]
