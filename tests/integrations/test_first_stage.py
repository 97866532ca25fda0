"""Fusion with the scores that the documents of each library carry."""

import json
import math
import pickle
import shutil
from dataclasses import replace
from functools import partial

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan
from flagembedding_matryoshka.setting import Setting
from tests.integrations.conftest import QUERY, TEXTS

pytestmark = pytest.mark.usefixtures("one_thread")
SCORES = [9.0, None, 1.5, 3.0]
KEYS = {"first_stage_key": "bm25"}
PLAN = Plan(
    exit_layers=(2, 3, 4, 5, 6),
    adapters=(),
    data="d/test",
    queries=9,
    candidates="BM25's first 10",
    settings=(Measurement(Setting(6), 0.6, 1.0),),
    fusion=0.4,
)


class LangChain:
    of_scores = KEYS

    def __init__(self, reranker, **options):
        module = pytest.importorskip("flagembedding_matryoshka.integrations.langchain")
        self.made = module.MatryoshkaCompressor(reranker, **options)

    def rank(self, scores=SCORES):
        documents = pytest.importorskip("langchain_core.documents")
        given = [
            documents.Document(page_content=text, metadata={} if score is None else {"bm25": score})
            for text, score in zip(TEXTS, scores, strict=True)
        ]
        found = self.made.compress_documents(given, QUERY)
        assert all(one.metadata.keys() <= {"bm25"} for one in given)
        return [(one.page_content, one.metadata["relevance_score"], one.metadata) for one in found]


class LlamaIndex:
    of_scores = {}

    def __init__(self, reranker, **options):
        module = pytest.importorskip("flagembedding_matryoshka.integrations.llama_index")
        self.made = module.MatryoshkaRerank(reranker, **options)

    def rank(self, scores=SCORES):
        schema = pytest.importorskip("llama_index.core.schema")
        nodes = [
            schema.NodeWithScore(node=schema.TextNode(text=text, metadata={"bm25": score}), score=score)
            for text, score in zip(TEXTS, scores, strict=True)
        ]
        for one in nodes:
            one.node.excluded_embed_metadata_keys = ["bm25"]
        found = self.made.postprocess_nodes(nodes, query_str=QUERY)
        assert all(one.node.metadata.keys() == {"bm25"} for one in nodes)
        return [(one.node.text, one.score, one.node.metadata) for one in found]


class Haystack:
    of_scores = {}

    def __init__(self, reranker, **options):
        module = pytest.importorskip("flagembedding_matryoshka.integrations.haystack")
        self.made = module.MatryoshkaRanker(reranker, **options)
        self.made.warm_up()

    def rank(self, scores=SCORES, **options):
        haystack = pytest.importorskip("haystack")
        given = [
            haystack.Document(content=text, score=score, meta={"bm25": score})
            for text, score in zip(TEXTS, scores, strict=True)
        ]
        found = self.made.run(QUERY, given, **options)["documents"]
        assert all(one.meta.keys() == {"bm25"} for one in given)
        assert {one.id for one in found} <= {one.id for one in given}
        return [(one.content, one.score, one.meta) for one in found]


class Rerankers:
    of_scores = KEYS

    def __init__(self, reranker, **options):
        module = pytest.importorskip("flagembedding_matryoshka.integrations.rerankers")
        self.made = module.MatryoshkaLayerWiseRanker(reranker, verbose=0, **options)

    def rank(self, scores=SCORES, **options):
        metadata = [{"bm25": score} for score in scores]
        found = self.made.rank(QUERY, TEXTS, metadata=metadata, **options)
        assert all(one.keys() == {"bm25"} for one in metadata)
        return [(one.text, one.score, one.metadata) for one in found]


LIBRARIES = [LangChain, LlamaIndex, Haystack, Rerankers]
WITHOUT_FIELD, WITH_FIELD = LIBRARIES[::3], LIBRARIES[1:3]


def close(found, hits):
    """Whether results of a library are these hits of the re-ranker."""
    assert [TEXTS.index(text) for text, *_ in found] == [hit["corpus_id"] for hit in hits]
    for (_, score, metadata), hit in zip(found, hits, strict=True):
        if "fused_score" in hit:
            assert score == pytest.approx(hit["fused_score"], abs=1e-5)
            assert metadata["reranker_score"] == pytest.approx(hit["score"], abs=1e-5)
            assert metadata["first_stage_score"] == hit["first_stage_score"]
        else:
            assert score == pytest.approx(hit["score"], abs=1e-5)
            assert not {"reranker_score", "first_stage_score"} & metadata.keys()


@pytest.fixture(scope="module")
def from_path(tiny_layerwise_path):
    return {"reranker": str(tiny_layerwise_path), "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def planned(tiny_layerwise_path, tmp_path_factory):
    """A re-ranker that follows a plan with a weight."""
    path = shutil.copytree(tiny_layerwise_path, tmp_path_factory.mktemp("planned") / "model")
    PLAN.write(path / PLAN_NAME)
    with pytest.warns(UserWarning, match="names no weights"):
        return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", budget=1.0)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("options", [{}, {"normalize": True, "cutoff_layers": 3}, {"cascade": {3: 0.5}}])
def test_documents_rank_by_the_fused_score(reranker, library, options):
    hits = reranker.rank(QUERY, TEXTS, first_stage_scores=SCORES, fusion=2.0, **options)
    assert [hit["corpus_id"] for hit in hits] != [hit["corpus_id"] for hit in reranker.rank(QUERY, TEXTS, **options)]
    found = library(reranker, fusion=2.0, **library.of_scores, **options).rank()
    close(found, hits)
    if "cascade" not in options:
        assert [score for _, score, _ in found] == sorted((score for _, score, _ in found), reverse=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_path_takes_a_weight_and_is_saved_with_it(reranker, from_path, library):
    made = library(**from_path, fusion=2.0, **library.of_scores)
    hits = reranker.rank(QUERY, TEXTS, first_stage_scores=SCORES, fusion=2.0)
    close(made.rank(), hits)
    made.made = pickle.loads(pickle.dumps(made.made))
    close(made.rank(), hits)
    by_order = library(**from_path, fusion=2.0, first_stage="order")
    assert pickle.loads(pickle.dumps(by_order.made))._ranking.first_stage == "order"
    close(by_order.rank(), reranker.rank(QUERY, TEXTS, first_stage="order", fusion=2.0))


def test_haystack_and_llama_index_save_the_source_of_scores(reranker, from_path):
    hits = reranker.rank(QUERY, TEXTS, first_stage_scores=SCORES, fusion=2.0)
    haystack, llama_index = (library(**from_path, fusion=2.0, **KEYS) for library in (Haystack, LlamaIndex))
    haystack.made = type(haystack.made).from_dict(json.loads(json.dumps(haystack.made.to_dict())))
    llama_index.made = type(llama_index.made).from_json(llama_index.made.to_json())
    close(haystack.rank(), hits)
    close(llama_index.rank(), hits)


@pytest.mark.parametrize("library", WITH_FIELD)
def test_a_key_replaces_the_librarys_field(reranker, library):
    made = library(reranker, fusion=2.0, first_stage_key="rank")
    with pytest.raises(ValueError, match=r"first_stage_key='rank' needs .* none of 4 texts has one"):
        made.rank()


@pytest.mark.parametrize("library", LIBRARIES)
def test_scores_without_a_weight_change_nothing_or_are_refused(reranker, library):
    close(library(reranker).rank(), reranker.rank(QUERY, TEXTS))
    for asked in (KEYS, {"first_stage": "order"}):
        with pytest.raises(ValueError, match="need a weight"):
            library(reranker, **asked)


@pytest.mark.parametrize("library", WITH_FIELD)
def test_a_plans_weight_is_for_documents_with_scores(planned, library):
    close(library(planned).rank(), planned.rank(QUERY, TEXTS, first_stage_scores=SCORES))
    plain = planned.rank(QUERY, TEXTS)
    close(library(planned).rank([None] * 4), plain)
    close(library(planned, first_stage="none").rank(), plain)


@pytest.mark.parametrize("library", WITHOUT_FIELD)
def test_a_plans_weight_does_not_read_unnamed_metadata(planned, library):
    close(library(planned).rank(), planned.rank(QUERY, TEXTS))
    close(library(planned, **KEYS).rank(), planned.rank(QUERY, TEXTS, first_stage_scores=SCORES))
    with pytest.raises(ValueError, match="first_stage_key='bm25' needs the first stage's scores, but none of 4 texts"):
        library(planned, **KEYS).rank([None] * 4)


def test_a_rerankers_default_weight_acts_like_a_plans(tiny_layerwise_path):
    own = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", fusion=2.0)
    close(Haystack(own).rank(), own.rank(QUERY, TEXTS, first_stage_scores=SCORES))
    close(Haystack(own).rank([None] * 4), own.rank(QUERY, TEXTS))
    close(Haystack(own, fusion=0.5).rank(), own.rank(QUERY, TEXTS, first_stage_scores=SCORES, fusion=0.5))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_weight_is_refused_if_no_document_has_a_score(reranker, from_path, library):
    for given in ({"reranker": reranker}, from_path):
        made = library(**given, fusion=0.5, **library.of_scores)
        with pytest.raises(
            ValueError, match=r"none of 4 texts has one. Give first_stage_key, .* or first_stage='order'"
        ):
            made.rank([None] * 4)
    assert made.made._ranking(QUERY, [], [], scores=[]) == []


def test_langchain_needs_a_key_at_construction(reranker, from_path):
    for given in ({"reranker": reranker}, from_path):
        with pytest.raises(
            ValueError, match=r"fusion=0.5 needs .* the library's texts have no score field. Give first"
        ):
            LangChain(**given, fusion=0.5)
    with pytest.raises(ValueError, match="the library's texts have no score field"):
        Rerankers(reranker, fusion=0.5).rank()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_stage": "ranks"}, "first_stage is 'ranks', but must be 'order', 'none' or None"),
        ({"first_stage": "order"} | KEYS, "first_stage_key='bm25' and first_stage='order': give one of them"),
        ({"first_stage": "none"} | KEYS, "first_stage_key='bm25' and first_stage='none': give one of them"),
        ({"first_stage": "none", "fusion": 0.5}, "fusion=0.5 and first_stage='none': give one of them"),
        ({"first_stage": "order", "fusion": -1}, "fusion is -1, but must be finite and at least 0"),
    ],
)
def test_contradicting_options_are_refused_at_once(reranker, library, options, message):
    with pytest.raises(ValueError, match=message):
        library(reranker, **options)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_error_of_an_infinite_score_names_its_source(reranker, library):
    where = "metadata 'bm25'" if library.of_scores else "scores, which first_stage='none' ignores"
    with pytest.raises(ValueError, match=f"value 1 is nan, but must be finite.*They are the texts' {where}"):
        library(reranker, fusion=0.5, **library.of_scores).rank([1.0, math.nan, 2.0, 3.0])


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_threshold_is_compared_with_the_rerankers_score(reranker, library):
    hits = reranker.rank(QUERY, TEXTS, first_stage_scores=SCORES, fusion=2.0, normalize=True)
    least = sorted(hit["score"] for hit in hits)[2]
    options = {"fusion": 2.0, "normalize": True, "score_threshold": least, **library.of_scores}
    close(library(reranker, **options).rank(), [hit for hit in hits if hit["score"] >= least])


def test_a_key_with_text_is_refused_by_its_name(reranker):
    with pytest.raises(TypeError, match=r"value 3 must be a number, or None, got 'x'. They are .* metadata 'bm25'"):
        LangChain(reranker, fusion=0.5, **KEYS).rank([1.0, None, 2.0, "x"])


def test_a_call_has_its_own_weight(reranker):
    expected = partial(reranker.rank, QUERY, TEXTS, first_stage_scores=SCORES)
    close(Haystack(reranker).rank(fusion=2.0), expected(fusion=2.0))
    close(Haystack(reranker, fusion=0.1).rank(fusion=2.0), expected(fusion=2.0))
    with pytest.raises(ValueError, match=r"fusion=2.0 needs"):
        Haystack(reranker).rank([None] * 4, fusion=2.0)
    with pytest.raises(ValueError, match=r"fusion=2.0 and first_stage='none': give one of them"):
        Haystack(reranker, first_stage="none").rank(fusion=2.0)


def test_rerankers_takes_scores_with_a_call(reranker):
    made = Rerankers(reranker, fusion=2.0, **KEYS)
    close(made.rank(), reranker.rank(QUERY, TEXTS, first_stage_scores=SCORES, fusion=2.0))
    own = [1.0, 2.0, 3.0, None]
    for fusion in (None, 0.5):
        hits = reranker.rank(QUERY, TEXTS, first_stage_scores=own, fusion=fusion or 2.0)
        close(made.rank(first_stage_scores=own, fusion=fusion), hits)
    close(made.rank(first_stage="order"), reranker.rank(QUERY, TEXTS, first_stage="order", fusion=2.0))
    close(made.rank(first_stage="none"), reranker.rank(QUERY, TEXTS))
    for first_stage in ("order", "none"):
        with pytest.raises(ValueError, match=rf"first_stage_scores=\[.*\] and first_stage='{first_stage}'"):
            made.rank(first_stage_scores=own, first_stage=first_stage)
    with pytest.raises(ValueError, match="query 0 has 1 first_stage_scores, but 4 candidates"):
        made.rank(first_stage_scores=[1.0])
    with pytest.raises(ValueError, match="need a weight"):
        Rerankers(reranker).rank(first_stage_scores=own)


def test_rerankers_has_scores_is_false_with_a_cascade_and_scores_one_document(reranker):
    for options, is_ordered in (({}, True), ({"cascade": {3: 0.5}}, False), ({"deadline_ms": 1000}, False)):
        made = Rerankers(reranker, fusion=2.0, **KEYS, **options).made
        found = made.rank(QUERY, TEXTS, metadata=[{"bm25": score} for score in SCORES])
        assert found.has_scores == is_ordered
        assert [one.doc_id for one in found.top_k(4)] == [one.doc_id for one in found]
    plain = reranker.compute_score((QUERY, TEXTS[1]))
    assert Rerankers(reranker, fusion=2.0, **KEYS).made.score(QUERY, TEXTS[1]) == pytest.approx(plain[0], abs=1e-5)


def test_scores_of_a_node_are_not_read_as_its_text(reranker):
    schema = pytest.importorskip("llama_index.core.schema")
    made = LlamaIndex(reranker, fusion=2.0, keep_retrieval_score=True).made
    nodes = [
        schema.NodeWithScore(node=schema.TextNode(text=text), score=1.0 * place) for place, text in enumerate(TEXTS)
    ]
    found = made.postprocess_nodes(nodes, query_str=QUERY)
    assert all(one.node.metadata["retrieval_score"] == TEXTS.index(one.node.text) for one in found)
    for mode in (schema.MetadataMode.EMBED, schema.MetadataMode.LLM):
        assert all("reranker_score" not in one.node.get_content(mode) for one in found)
        assert all("first_stage_score" not in one.node.get_content(mode) for one in found)
    again = made.postprocess_nodes(found, query_str=QUERY)
    assert again[0].node.excluded_llm_metadata_keys == ["reranker_score", "first_stage_score"]
    assert all("reranker_score" not in one.node.metadata for one in nodes)


def test_haystack_takes_the_best_score_of_documents_of_one_id(reranker):
    haystack = pytest.importorskip("haystack")
    given = [haystack.Document(content=text, score=float(place)) for place, text in enumerate(TEXTS)]
    given = [replace(given[0], score=9.0), *given]
    found = Haystack(reranker, fusion=2.0).made.run(QUERY, given)["documents"]
    hits = reranker.rank(QUERY, TEXTS, first_stage_scores=[9.0, 1.0, 2.0, 3.0], fusion=2.0)
    close([(one.content, one.score, one.meta) for one in found], hits)
