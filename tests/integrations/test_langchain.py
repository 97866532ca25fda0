import asyncio

import pytest

pytest.importorskip("langchain_core")
from langchain_core.documents import BaseDocumentCompressor, Document

from flagembedding_matryoshka.integrations.langchain import MatryoshkaCompressor
from tests.integrations.conftest import OPTIONS, QUERY, TEXTS, expected

pytestmark = pytest.mark.usefixtures("one_thread")
DOCUMENTS = [Document(page_content=text, metadata={"source": str(place)}) for place, text in enumerate(TEXTS)]


def scored(documents):
    return [(document.page_content, document.metadata["relevance_score"]) for document in documents]


@pytest.mark.parametrize("options", OPTIONS)
def test_documents_are_ranked(reranker, options):
    compressor = MatryoshkaCompressor(reranker, top_n=2, **options)
    assert isinstance(compressor, BaseDocumentCompressor)
    found = compressor.compress_documents(DOCUMENTS, QUERY)
    assert scored(found) == expected(reranker, 2, **options)
    assert all(TEXTS[int(document.metadata["source"])] == document.page_content for document in found)
    assert all(document.metadata.keys() == {"source"} for document in DOCUMENTS)
    assert scored(asyncio.run(compressor.acompress_documents(DOCUMENTS, QUERY))) == scored(found)


def test_a_path_is_loaded(tiny_layerwise_path, reranker):
    compressor = MatryoshkaCompressor(str(tiny_layerwise_path))
    assert [text for text, _ in scored(compressor.compress_documents(DOCUMENTS, QUERY))] == [
        text for text, _ in expected(compressor._ranking.reranker)
    ]
    assert compressor.compress_documents([], QUERY) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cutoff_layers": 9}, ValueError, r"cutoff_layers \[9\] have no head"),
        ({"cutof_layers": 3}, TypeError, r"unknown arguments \['cutof_layers'\]"),
        ({"top_n": 0}, ValueError, "top_k is 0"),
        ({"cascade": {9: 0.5}}, ValueError, "cascade drops candidates after layer 9"),
    ],
)
def test_options_are_checked_at_once(reranker, options, error, message):
    with pytest.raises(error, match=message):
        MatryoshkaCompressor(reranker, **options)
