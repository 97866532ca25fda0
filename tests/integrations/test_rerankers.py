import asyncio
import pickle

import pytest
import torch

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
        text for text, _ in expected(ranker._ranking.load(), cutoff_layers=4)
    ]


def test_a_path_takes_what_the_constructor_takes(other_path):
    path = other_path["reranker"]
    options = {"device": "cpu", "dtype": "bf16", "max_sequence_length": 64, "verbose": 0}
    ranker = Reranker(path, model_type="MatryoshkaLayerWiseRanker", **options)
    loaded = ranker._ranking.load()
    assert (loaded.max_length, loaded.model.dtype, loaded.target_devices) == (64, torch.bfloat16, ["cpu"])
    found = [(result.doc_id, result.score) for result in ranker.rank(QUERY, TEXTS)]
    again = pickle.loads(pickle.dumps(ranker)).rank(QUERY, TEXTS)
    assert [(result.doc_id, result.score) for result in again] == found
    with pytest.raises(ValueError, match="max_sequence_length=64 and max_length=32: give one"):
        MatryoshkaLayerWiseRanker(path, max_sequence_length=64, max_length=32)


def test_a_call_has_its_own_lengths(reranker):
    texts = ["a flow of energy " * 20, "lift"]
    found = MatryoshkaLayerWiseRanker(reranker).rank(QUERY, texts, batch_size=1, max_sequence_length=48)
    hits = reranker.rank(QUERY, texts, max_length=48)
    assert [(result.doc_id, result.score) for result in found] == [
        (hit["corpus_id"], pytest.approx(hit["score"], abs=1e-5)) for hit in hits
    ]


def test_no_documents_and_any_container(reranker):
    ranker = MatryoshkaLayerWiseRanker(reranker, meta_fields_to_embed=["title"])
    assert ranker.rank(QUERY, []).results == []
    assert [result.text for result in ranker.rank(QUERY, TEXTS[0])] == [TEXTS[0]]
    metadata = [{"title": str(place)} for place in range(len(TEXTS))]
    found = ranker.rank(QUERY, iter(TEXTS), doc_ids=list("abcd"), metadata=metadata)
    of_documents = ranker.rank(QUERY, [Document(text) for text in TEXTS], list("abcd"), metadata)
    assert [(result.doc_id, result.score) for result in found] == [
        (result.doc_id, result.score) for result in of_documents
    ]
    hits = reranker.rank(QUERY, [f"{place}\n{text}" for place, text in enumerate(TEXTS)])
    assert [result.doc_id for result in found] == ["abcd"[hit["corpus_id"]] for hit in hits]
    with pytest.raises(ValueError, match="4 documents need as many doc_ids, got 3"):
        ranker.rank(QUERY, TEXTS, doc_ids=[1, 2, 3])
    image = Document(document_type="image", image_path="wing.png")
    with pytest.raises(TypeError, match=r"document 1 has no text to rank, got Document\(text=None"):
        ranker.rank(QUERY, [Document("lift"), image])


def test_a_threshold_leaves_out_and_a_score_is_a_score(reranker):
    every = MatryoshkaLayerWiseRanker(reranker).rank(QUERY, TEXTS)
    ranker = MatryoshkaLayerWiseRanker(reranker, score_threshold=every[1].score)
    assert [result.doc_id for result in ranker.rank(QUERY, TEXTS)] == [result.doc_id for result in every[:2]]
    assert ranker.score(QUERY, every[3].text) == pytest.approx(every[3].score, abs=1e-5)
