import pytest

pytest.importorskip("haystack")
from haystack import Document, Pipeline

from flagembedding_matryoshka.integrations.haystack import MatryoshkaRanker
from tests.integrations.conftest import OPTIONS, QUERY, TEXTS, expected

pytestmark = pytest.mark.usefixtures("one_thread")
DOCUMENTS = [Document(content=text, score=0.5, meta={"source": place}) for place, text in enumerate(TEXTS)]


def scored(documents):
    return [(document.content, document.score) for document in documents]


@pytest.mark.parametrize("options", OPTIONS)
def test_documents_are_ranked(reranker, options):
    ranker = MatryoshkaRanker(reranker, top_k=2, **options)
    found = ranker.run(QUERY, DOCUMENTS)["documents"]
    assert scored(found) == expected(reranker, 2, **options)
    assert [document.id for document in found] == [DOCUMENTS[document.meta["source"]].id for document in found]
    assert scored(ranker.run(QUERY, DOCUMENTS, top_k=1)["documents"]) == expected(reranker, 1, **options)
    assert ranker.run(QUERY, []) == {"documents": []}
    assert {document.score for document in DOCUMENTS} == {0.5}


def test_a_saved_pipeline_ranks_as_before(tiny_layerwise_path):
    pipeline = Pipeline()
    ranker = MatryoshkaRanker(str(tiny_layerwise_path), top_k=3, compress_layers=[2], compress_ratio=2, cascade={3: 1})
    pipeline.add_component("ranker", ranker)
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=[MatryoshkaRanker.__module__])
    inputs = {"ranker": {"query": QUERY, "documents": DOCUMENTS}}
    found = pipeline.run(inputs)["ranker"]["documents"]
    assert len(found) == 3
    assert again.run(inputs)["ranker"]["documents"] == found


def test_a_ranker_of_an_object_is_not_saved(reranker):
    with pytest.raises(ValueError, match="make it from a path"):
        MatryoshkaRanker(reranker).to_dict()


def test_warm_up_checks_the_options(reranker):
    with pytest.raises(ValueError, match=r"cutoff_layers \[9\] have no head"):
        MatryoshkaRanker(reranker, cutoff_layers=9).warm_up()


def test_a_document_without_text_is_named(reranker):
    with pytest.raises(TypeError, match="document 1 of query 0 must be a string, got None"):
        MatryoshkaRanker(reranker).run(QUERY, [DOCUMENTS[0], Document(meta={"a": 1})])
