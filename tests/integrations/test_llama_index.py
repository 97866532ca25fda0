import asyncio

import pytest

pytest.importorskip("llama_index.core")
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
