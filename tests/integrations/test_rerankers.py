import asyncio

import pytest

pytest.importorskip("rerankers")
from rerankers import Document, Reranker

from flagembedding_matryoshka.integrations.rerankers import MatryoshkaLayerWiseRanker
from tests.integrations.conftest import OPTIONS, QUERY, TEXTS, expected

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("options", OPTIONS)
def test_documents_are_ranked(reranker, options):
    ranker = MatryoshkaLayerWiseRanker(reranker, **options)
    found = ranker.rank(QUERY, TEXTS)
    assert [(result.text, result.score) for result in found] == expected(reranker, **options)
    assert [result.rank for result in found] == [1, 2, 3, 4]
    assert [TEXTS[result.doc_id] for result in found] == [result.text for result in found]
    assert [result.text for result in found.top_k(2)] == [text for text, _ in expected(reranker, **options)][:2]
    later = asyncio.run(ranker.rank_async(QUERY, TEXTS, None))
    assert [result.doc_id for result in later] == [result.doc_id for result in found]


def test_identities_and_metadata_stay(reranker):
    documents = [Document(text, doc_id=f"d{place}", metadata={"place": place}) for place, text in enumerate(TEXTS)]
    for result in MatryoshkaLayerWiseRanker(reranker).rank(QUERY, documents):
        assert result.doc_id == f"d{result.metadata['place']}"
        assert result.text == TEXTS[result.metadata["place"]]


def test_the_score_of_one_document(reranker):
    ranker = MatryoshkaLayerWiseRanker(reranker, cutoff_layers=3)
    assert ranker.score(QUERY, TEXTS[1]) == dict(expected(reranker, cutoff_layers=3))[TEXTS[1]]


def test_found_by_name(tiny_layerwise_path, capsys):
    ranker = Reranker(str(tiny_layerwise_path), model_type="MatryoshkaLayerWiseRanker", verbose=0, cutoff_layers=4)
    assert isinstance(ranker, MatryoshkaLayerWiseRanker)
    assert [result.text for result in ranker.rank(QUERY, TEXTS)] == [
        text for text, _ in expected(ranker._ranking.reranker, cutoff_layers=4)
    ]
