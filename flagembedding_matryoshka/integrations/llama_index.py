"""LlamaIndex: `index.as_query_engine(node_postprocessors=[MatryoshkaRerank(path, top_n=5)])`."""

from __future__ import annotations

from os import PathLike
from typing import Any

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import PrivateAttr

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.adapter import RankingAdapter, TextHit

dispatcher = get_dispatcher(__name__)


class MatryoshkaRerank(BaseNodePostprocessor):
    """Rank nodes, best first, and replace the retriever's score by the re-ranker's.

    A node's text is the text that LlamaIndex embeds, with metadata. With `meta_fields_to_embed` it is the node's own
    text with these fields.

    With fusion, the first stage's scores are the nodes' scores. A returned node's score is the fused score, and its
    metadata have "reranker_score" and "first_stage_score". Neither is embedded or shown to a language model.

    A call sends LlamaIndex's `ReRankStartEvent` and `ReRankEndEvent`, and `CBEventType.RERANKING` to callbacks.

    Args:
        reranker: a re-ranker, or the path of one.
        top_n: most nodes to return; None is all. It can be changed later.
        keep_retrieval_score: whether to keep the retriever's score in `metadata["retrieval_score"]`.
        options: as in [`~flagembedding_matryoshka.integrations.adapter.RankingAdapter`].
    """

    top_n: int | None = None
    keep_retrieval_score: bool = False
    _ranking: RankingAdapter = PrivateAttr()

    def __init__(
        self,
        reranker: MatryoshkaReranker | str | PathLike[str],
        top_n: int | None = None,
        keep_retrieval_score: bool = False,
        **options: Any,
    ) -> None:
        of_pydantic: dict[str, Any] = {"top_n": top_n, "keep_retrieval_score": keep_retrieval_score}
        super().__init__(**of_pydantic)
        self._ranking = RankingAdapter(reranker, **options)
        self._ranking.check(top_n)

    @classmethod
    def class_name(cls) -> str:
        return "MatryoshkaRerank"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return the input of `from_dict`. Raises ValueError if the postprocessor was made from a loaded re-ranker."""
        return super().to_dict(**kwargs) | self._ranking.arguments()

    def __getstate__(self) -> dict[str, Any]:
        # LlamaIndex would leave out a field that cannot be pickled. Raise an error instead.
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
        name = self._ranking.load().model_name_or_path
        top_n = len(nodes) if self.top_n is None else self.top_n
        dispatcher.event(ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=top_n, model_name=name))
        payload: dict[Any, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: name,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            contents, metadata = [item.node.get_content(mode) for item in nodes], [item.node.metadata for item in nodes]
            ranked = self._ranking(query, contents, metadata, self.top_n, scores=[item.score for item in nodes])
            found = [self._scored(nodes[hit.index], hit) for hit in ranked]
            event.on_end(payload={EventPayload.NODES: found})
        dispatcher.event(ReRankEndEvent(nodes=found))
        return found

    def _scored(self, item: NodeWithScore, hit: TextHit) -> NodeWithScore:
        node = item.node
        if self.keep_retrieval_score:
            node = node.model_copy(update={"metadata": node.metadata | {"retrieval_score": item.score}})
        if hit.metadata:
            # LlamaIndex writes metadata into the text for a model, unless their keys are excluded.
            excluded = {
                name: [*getattr(node, name), *(key for key in hit.metadata if key not in getattr(node, name))]
                for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
            }
            node = node.model_copy(update={"metadata": node.metadata | hit.metadata, **excluded})
        return NodeWithScore(node=node, score=hit.score)
