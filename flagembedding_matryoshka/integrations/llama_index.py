"""LlamaIndex: `index.as_query_engine(node_postprocessors=[MatryoshkaRerank(path, top_n=5)])`."""

from __future__ import annotations

from os import PathLike
from typing import Any

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import PrivateAttr

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.ranking import Hit, Ranking


class MatryoshkaRerank(BaseNodePostprocessor):
    """Keeps the best nodes, best first, with our score instead of the retriever's.

    A node's text is what is embedded of it, metadata included; with `meta_fields_to_embed`, these and the text alone.

    With fusion the nodes' scores are the first stage's, and the score of a returned node is the fused one. Its metadata
    hold the re-ranker's as "reranker_score" and the first stage's as "first_stage_score"; neither is embedded or shown
    to a language model.

    Args:
        reranker: or the path of one.
        top_n: how many nodes to keep, at most; None is all. It can be set later, too.
        keep_retrieval_score: whether to keep the retriever's score in `metadata["retrieval_score"]`.
        options: as in [`~flagembedding_matryoshka.integrations.ranking.Ranking`].
    """

    top_n: int | None = None
    keep_retrieval_score: bool = False
    _ranking: Ranking = PrivateAttr()

    def __init__(
        self,
        reranker: MatryoshkaReranker | str | PathLike[str],
        top_n: int | None = None,
        keep_retrieval_score: bool = False,
        **options: Any,
    ) -> None:
        of_pydantic: dict[str, Any] = {"top_n": top_n, "keep_retrieval_score": keep_retrieval_score}
        super().__init__(**of_pydantic)
        self._ranking = Ranking(reranker, **options)
        self._ranking.check(top_n)

    @classmethod
    def class_name(cls) -> str:
        return "MatryoshkaRerank"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What `from_dict` makes the same of; ValueError unless it was made from a path."""
        return super().to_dict(**kwargs) | self._ranking.arguments()

    def __getstate__(self) -> dict[str, Any]:
        # LlamaIndex leaves out what cannot be pickled; here, that is an error.
        self._ranking.arguments()
        return super().__getstate__()

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("re-ranking needs a query: give query_str or query_bundle.")
        if not nodes:
            return []
        query = query_bundle.query_str
        mode = MetadataMode.NONE if self._ranking.meta_fields_to_embed else MetadataMode.EMBED
        payload: dict[Any, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self._ranking.load().model_name_or_path,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            contents, metadata = [item.node.get_content(mode) for item in nodes], [item.node.metadata for item in nodes]
            ranked = self._ranking(query, contents, metadata, self.top_n, scores=[item.score for item in nodes])
            found = [self._scored(nodes[hit.index], hit) for hit in ranked]
            event.on_end(payload={EventPayload.NODES: found})
        return found

    def _scored(self, item: NodeWithScore, hit: Hit) -> NodeWithScore:
        node = item.node
        if self.keep_retrieval_score:
            node = node.model_copy(update={"metadata": node.metadata | {"retrieval_score": item.score}})
        if hit.metadata:
            # Metadata stand in the text that a model reads, unless they are excluded.
            excluded = {
                name: [*getattr(node, name), *(key for key in hit.metadata if key not in getattr(node, name))]
                for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
            }
            node = node.model_copy(update={"metadata": node.metadata | hit.metadata, **excluded})
        return NodeWithScore(node=node, score=hit.score)
