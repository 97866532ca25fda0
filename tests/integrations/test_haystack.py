import asyncio
import pickle
from dataclasses import replace

import pytest
import torch

pytest.importorskip("haystack")
from haystack import Document, Pipeline
from haystack.utils import ComponentDevice, Secret

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
    assert asyncio.run(ranker.run_async(QUERY, DOCUMENTS)) == {"documents": found}
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
    with pytest.raises(ValueError, match="give its path"):
        MatryoshkaRanker(reranker).to_dict()


def test_warm_up_checks_the_options(reranker):
    with pytest.raises(ValueError, match=r"cutoff_layers \[9\] have no head"):
        MatryoshkaRanker(reranker, cutoff_layers=9).warm_up()


def test_a_document_without_content_is_ranked_by_its_metadata(reranker):
    documents = [DOCUMENTS[0], Document(meta={"title": "wing"}), Document(content="lift", meta={"title": None})]
    found = MatryoshkaRanker(reranker, meta_fields_to_embed=["title"], embedding_separator=": ").run(QUERY, documents)
    hits = reranker.rank(QUERY, [TEXTS[0], "wing: ", "lift"])
    assert scored(found["documents"]) == [
        (documents[hit["corpus_id"]].content, pytest.approx(hit["score"], abs=1e-5)) for hit in hits
    ]


def test_scores_are_scaled_and_cut(reranker):
    ranker = MatryoshkaRanker(reranker, scale_score=True, score_threshold=0.0)
    scaled = ranker.run(QUERY, DOCUMENTS)["documents"]
    assert scored(scaled) == expected(reranker, normalize=True)
    assert scored(ranker.run(QUERY, DOCUMENTS, scale_score=False, score_threshold=-1e9)["documents"]) == expected(
        reranker
    )
    least = scaled[1].score
    assert ranker.run(QUERY, DOCUMENTS, score_threshold=least)["documents"] == scaled[:2]
    assert ranker.run(QUERY, DOCUMENTS, score_threshold=1.5)["documents"] == []


@pytest.mark.parametrize("options", [{"cascade": {3: 0.5}}, {"deadline_ms": 1000}])
def test_no_threshold_holds_at_several_exits(reranker, options):
    with pytest.raises(ValueError, match=r"min_score=0.5 beside \w+=.*: scores of different exits do not mean"):
        MatryoshkaRanker(reranker, score_threshold=0.5, **options).run(QUERY, DOCUMENTS)
    assert MatryoshkaRanker(reranker, **options).run(QUERY, DOCUMENTS)["documents"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale_score": True, "normalize": False}, ValueError, "scale_score=True and normalize=False: give one"),
        ({"score_threshold": float("nan")}, ValueError, "score_threshold is nan, but must be a number"),
        (
            {"document_prefix": "x"},
            TypeError,
            r"unknown arguments \['document_prefix'\]: allowed are \['allow_pickle', 'batch_invariant'",
        ),
        ({"meta_fields_to_embed": "title"}, TypeError, "must be a list of names, got the string 'title'"),
        ({"device": "cpu", "devices": ["cpu"]}, ValueError, r"device='cpu' and devices=\['cpu'\]: give one of them"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(options, error, message):
    with pytest.raises(error, match=message):
        MatryoshkaRanker("nothing/is/there", **options)


def test_documents_of_one_id_are_ranked_once(reranker):
    again = [replace(DOCUMENTS[1], score=0.9, meta={"source": "better"}), replace(DOCUMENTS[1], score=0.1)]
    found = MatryoshkaRanker(reranker).run(QUERY, [*DOCUMENTS, *again])["documents"]
    assert len(found) == len(DOCUMENTS)
    (kept,) = (document for document in found if document.id == DOCUMENTS[1].id)
    assert kept.meta == {"source": "better"}


def test_a_pipeline_is_saved_with_what_it_loads(other_path, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_A_TEST", "hf_secret")
    given = other_path | {"device": ComponentDevice.from_str("cpu"), "dtype": torch.float32}
    ranker = MatryoshkaRanker(**given, token=Secret.from_env_var("TOKEN_OF_A_TEST"), score_threshold=-5.0, top_k=2)
    pipeline = Pipeline()
    pipeline.add_component("ranker", ranker)
    written = pipeline.dumps()
    assert "hf_secret" not in written and "hf_secret" not in str(pickle.dumps(ranker))
    inputs = {"ranker": {"query": QUERY, "documents": DOCUMENTS}}
    found = pipeline.run(inputs)
    assert len(found["ranker"]["documents"]) == 2
    again = Pipeline.loads(written, allowed_modules=[MatryoshkaRanker.__module__])
    assert again.run(inputs) == found
    assert pickle.loads(pickle.dumps(ranker)).run(QUERY, DOCUMENTS) == found["ranker"]
    assert asyncio.run(again.run_async(inputs)) == found
    with pytest.raises(ValueError, match="would be saved as it is"):
        MatryoshkaRanker(**other_path, token="hf_secret").to_dict()
