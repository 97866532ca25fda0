import asyncio
import copy
import pickle

import pytest
import torch

pytest.importorskip("langchain_core")
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.load import dumpd, dumps, loads

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
        text for text, _ in expected(compressor._ranking.load())
    ]
    assert compressor.compress_documents([], QUERY) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cutoff_layers": 9}, ValueError, r"cutoff_layers \[9\] have no head"),
        ({"cutof_layers": 3}, TypeError, r"unknown arguments \['cutof_layers'\]"),
        ({"top_n": 0}, ValueError, "top_k is 0"),
        ({"dtype": "float32"}, TypeError, r"\['dtype'\] are options of loading, and this re-ranker is loaded"),
        ({"cascade": {9: 0.5}}, ValueError, "cascade drops candidates after layer 9"),
    ],
)
def test_options_are_checked_at_once(reranker, options, error, message):
    with pytest.raises(error, match=message):
        MatryoshkaCompressor(reranker, **options)


def test_a_path_takes_what_the_constructor_takes(other_path):
    compressor = MatryoshkaCompressor(**other_path, top_n=3, score_threshold=-1e9)
    reranker = compressor._ranking.load()
    assert reranker.target_devices == ["cpu"] and reranker.model.dtype == torch.bfloat16
    found = scored(compressor.compress_documents(DOCUMENTS, QUERY))
    assert found == expected(reranker, 3, cutoff_layers=4)
    again = pickle.loads(pickle.dumps(compressor))
    assert again.top_n == 3 and scored(again.compress_documents(DOCUMENTS, QUERY)) == found
    assert copy.deepcopy(compressor)._ranking.load() is reranker


def test_a_compressor_of_an_object_is_not_pickled(reranker):
    with pytest.raises(ValueError, match="cannot be saved or pickled: give its path"):
        pickle.dumps(MatryoshkaCompressor(reranker))


def test_langchain_saves_a_compressor(tiny_layerwise_path, reranker):
    options = {"top_n": 3, "cascade": {3: 1.0}, "meta_fields_to_embed": ["title"], "token": "hf_secret"}
    compressor = MatryoshkaCompressor(str(tiny_layerwise_path), **options)
    text = dumps(compressor)
    assert "hf_secret" not in text
    ours = {"allowed_objects": [MatryoshkaCompressor], "valid_namespaces": ["flagembedding_matryoshka"]}
    again = loads(text, secrets_map={"HF_TOKEN": "hf_secret"}, **ours)
    assert again.top_n == 3 and again._ranking.arguments() == compressor._ranking.arguments()
    assert scored(again.compress_documents(DOCUMENTS, QUERY)) == scored(compressor.compress_documents(DOCUMENTS, QUERY))
    assert dumpd(MatryoshkaCompressor(reranker))["type"] == "not_implemented"  # as tracers write it


def test_metadata_stand_before_the_text(reranker):
    documents = [Document(page_content="lift", metadata={"title": "wing", "year": 1903, "note": None})]
    compressor = MatryoshkaCompressor(reranker, meta_fields_to_embed=["year", "title", "note", "absent"])
    ((_, score),) = scored(compressor.compress_documents(documents, QUERY))
    (hit,) = reranker.rank(QUERY, ["1903\nwing\nlift"])
    assert score == pytest.approx(hit["score"], abs=1e-5)
    assert documents[0].metadata.keys() == {"title", "year", "note"}


def test_top_n_may_be_set_later(reranker):
    compressor = MatryoshkaCompressor(reranker, top_n=1)
    compressor.top_n = 3
    assert len(compressor.compress_documents(DOCUMENTS, QUERY)) == 3


def test_questions_at_once_get_their_own_answers(reranker):
    compressor = MatryoshkaCompressor(reranker, top_n=2)
    queries = [QUERY, "heat", "lift", "the flow of energy"]

    async def ask():
        return await asyncio.gather(*(compressor.acompress_documents(DOCUMENTS, query) for query in queries))

    for query, found in zip(queries, asyncio.run(ask()), strict=True):
        assert scored(found) == [
            (text, pytest.approx(score, abs=1e-5))
            for text, score in scored(compressor.compress_documents(DOCUMENTS, query))
        ]
