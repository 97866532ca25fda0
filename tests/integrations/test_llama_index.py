import asyncio
import pickle

import pytest

pytest.importorskip("llama_index.core")
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from flagembedding_matryoshka.integrations.llama_index import MatryoshkaRerank
from tests.integrations.conftest import OPTIONS, QUERY, TEXTS, expected

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def nodes():
    return [NodeWithScore(node=TextNode(text=text), score=0.5) for text in TEXTS]


@pytest.mark.parametrize("options", OPTIONS)
def test_nodes_are_ranked(reranker, nodes, options):
    postprocessor = MatryoshkaRerank(reranker, top_n=2, **options)
    found = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [(node.text, node.score) for node in found] == expected(reranker, 2, **options)
    assert [node.score for node in nodes] == [0.5] * len(nodes)
    assert found == postprocessor.postprocess_nodes(nodes, QueryBundle(QUERY))
    assert found == asyncio.run(postprocessor.apostprocess_nodes(nodes, QueryBundle(QUERY)))
    assert postprocessor.postprocess_nodes([], query_str=QUERY) == []


def test_metadata_that_is_embedded_is_ranked_too(reranker):
    node = TextNode(text="lift", metadata={"title": "wing", "id": "7"}, excluded_embed_metadata_keys=["id"])
    (found,) = MatryoshkaRerank(reranker).postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)
    (hit,) = reranker.rank(QUERY, ["title: wing\n\nlift"])
    assert found.score == pytest.approx(hit["score"], abs=1e-5)


def test_a_query_is_wanted(reranker, nodes):
    with pytest.raises(ValueError, match="needs a query"):
        MatryoshkaRerank(reranker).postprocess_nodes(nodes)


def test_behind_a_retriever(reranker):
    from llama_index.core import MockEmbedding, VectorStoreIndex

    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=MockEmbedding(4))
    retrieved = index.as_retriever(similarity_top_k=4).retrieve(QUERY)
    found = MatryoshkaRerank(reranker, top_n=3).postprocess_nodes(retrieved, query_str=QUERY)
    assert [(node.text, node.score) for node in found] == expected(reranker, 3)


def test_a_path_takes_what_the_constructor_takes(other_path, nodes):
    postprocessor = MatryoshkaRerank(**other_path, top_n=3, cascade={3: 1.0}, meta_fields_to_embed=["title"])
    found = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [(node.text, node.score) for node in found] == expected(
        postprocessor._ranking.load(), 3, cutoff_layers=4, cascade={3: 1.0}
    )
    for again in (
        pickle.loads(pickle.dumps(postprocessor)),
        MatryoshkaRerank.from_json(postprocessor.to_json()),
    ):
        assert again.to_dict() == postprocessor.to_dict()
        assert again.postprocess_nodes(nodes, query_str=QUERY) == found


def test_a_postprocessor_of_an_object_is_not_pickled(reranker):
    for write in (pickle.dumps, MatryoshkaRerank.to_json):
        with pytest.raises(ValueError, match="cannot be saved or pickled: give its path"):
            write(MatryoshkaRerank(reranker))


def test_named_metadata_alone(reranker):
    node = TextNode(text="lift", metadata={"title": "wing", "id": "7"})
    postprocessor = MatryoshkaRerank(reranker, meta_fields_to_embed=["title"], keep_retrieval_score=True)
    (found,) = postprocessor.postprocess_nodes([NodeWithScore(node=node, score=0.5)], query_str=QUERY)
    (hit,) = reranker.rank(QUERY, ["wing\nlift"])
    assert found.score == pytest.approx(hit["score"], abs=1e-5)
    assert found.node.metadata == {"title": "wing", "id": "7", "retrieval_score": 0.5}
    assert node.metadata == {"title": "wing", "id": "7"}


def test_a_node_without_text_and_scores_below_the_threshold(reranker, nodes):
    nodes.append(NodeWithScore(node=TextNode(text="")))
    found = MatryoshkaRerank(reranker).postprocess_nodes(nodes, query_str=QUERY)
    assert len(found) == 5
    above = MatryoshkaRerank(reranker, score_threshold=found[2].score).postprocess_nodes(nodes, query_str=QUERY)
    assert [node.text for node in above] == [node.text for node in found[:3]]


def test_callbacks_hear_of_it(reranker, nodes):
    handler = LlamaDebugHandler(print_trace_on_end=False)
    postprocessor = MatryoshkaRerank(reranker, top_n=1)
    postprocessor.callback_manager = CallbackManager([handler])
    postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    ((start, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert start.payload["query_str"] == QUERY and len(end.payload["nodes"]) == 1


def test_events_of_the_instrumentation(reranker, nodes):
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.event_handlers import BaseEventHandler

    class Listener(BaseEventHandler):
        heard: list = []

        def handle(self, event, **kwargs):
            self.heard.append(event)

    root, listener = get_dispatcher(), Listener()
    root.add_event_handler(listener)
    try:
        found = MatryoshkaRerank(reranker, top_n=2).postprocess_nodes(nodes, query_str=QUERY)
        MatryoshkaRerank(reranker).postprocess_nodes(nodes, query_str=QUERY)
    finally:
        root.event_handlers.remove(listener)
    start, end, start_of_all, _ = (event for event in listener.heard if event.class_name().startswith("ReRank"))
    assert start.query.query_str == QUERY and start.nodes == nodes and start.model_name == reranker.model_name_or_path
    assert end.nodes == found and (start.top_n, start_of_all.top_n) == (2, len(nodes))
