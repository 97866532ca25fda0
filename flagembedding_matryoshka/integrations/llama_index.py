"""LlamaIndex: `index.as_query_engine(node_postprocessors=[MatryoshkaRerank(path, top_n=5)])`."""

from __future__ import annotations

from typing import Any

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import PrivateAttr

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.ranking import Ranking


class MatryoshkaRerank(BaseNodePostprocessor):
    """Keeps the best nodes, the best first, with our score instead of the retriever's.

    Args:
        reranker: or the path of one.
        top_n: how many nodes to keep; None is all.
        options: as in [`~flagembedding_matryoshka.integrations.ranking.Ranking`].
    """

    _ranking: Ranking = PrivateAttr()

    def __init__(self, reranker: MatryoshkaReranker | str, top_n: int | None = None, **options: Any) -> None:
        super().__init__()
        self._ranking = Ranking(reranker, top_n, options)

    @classmethod
    def class_name(cls) -> str:
        return "MatryoshkaRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("re-ranking needs a query: give query_str or query_bundle.")
        texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
        return [
            NodeWithScore(node=nodes[index].node, score=score)
            for index, score in self._ranking(query_bundle.query_str, texts)
        ]
