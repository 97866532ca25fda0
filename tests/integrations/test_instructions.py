"""Instructions and least scores through each library."""

import json
import pickle

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.integrations.adapter import RankingAdapter
from tests.integrations.conftest import QUERY, TEXTS
from tests.qwen import write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = "judge by the topic"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_causal_lm(tmp_path_factory.mktemp("models") / "Qwen3-Reranker-tiny", initializer_range=0.1))


@pytest.fixture(scope="module")
def qwen(path):
    return MatryoshkaReranker(path, dtype="float32", devices="cpu")


@pytest.fixture(scope="module")
def from_path(path):
    return {"reranker": path, "dtype": "float32", "device": "cpu"}


def ranked(qwen, **options):
    return [(hit["corpus_id"], pytest.approx(hit["score"], abs=1e-6)) for hit in qwen.rank(QUERY, TEXTS, **options)]


def of_texts(found):
    return [(TEXTS.index(text), score) for text, score in found]


class LangChain:
    def __init__(self, reranker, **options):
        module = pytest.importorskip("flagembedding_matryoshka.integrations.langchain")
        self.made = module.MatryoshkaCompressor(reranker, **options)

    def rank(self):
        documents = pytest.importorskip("langchain_core.documents")
        given = [documents.Document(page_content=text) for text in TEXTS]
        found = self.made.compress_documents(given, QUERY)
        return of_texts((one.page_content, one.metadata["relevance_score"]) for one in found)


class LlamaIndex:
    def __init__(self, reranker, **options):
        module = pytest.importorskip("flagembedding_matryoshka.integrations.llama_index")
        self.made = module.MatryoshkaRerank(reranker, **options)

    def rank(self):
        schema = pytest.importorskip("llama_index.core.schema")
        nodes = [schema.NodeWithScore(node=schema.TextNode(text=text)) for text in TEXTS]
        return of_texts((one.node.text, one.score) for one in self.made.postprocess_nodes(nodes, query_str=QUERY))


class Haystack:
    def __init__(self, reranker, **options):
        module = pytest.importorskip("flagembedding_matryoshka.integrations.haystack")
        self.made = module.MatryoshkaRanker(reranker, **options)
        self.made.warm_up()

    def rank(self, **options):
        haystack = pytest.importorskip("haystack")
        found = self.made.run(QUERY, [haystack.Document(content=text) for text in TEXTS], **options)["documents"]
        return of_texts((one.content, one.score) for one in found)


class Rerankers:
    def __init__(self, reranker, **options):
        module = pytest.importorskip("flagembedding_matryoshka.integrations.rerankers")
        self.made = module.MatryoshkaLayerWiseRanker(reranker, verbose=0, **options)

    def rank(self, **options):
        return [(one.doc_id, one.score) for one in self.made.rank(QUERY, TEXTS, **options)]


LIBRARIES = [LangChain, LlamaIndex, Haystack, Rerankers]


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_instruction_is_read(qwen, from_path, library):
    instructed, plain = ranked(qwen, instruction=TASK), ranked(qwen)
    assert [score for _, score in instructed] != [score for _, score in plain]
    for reranker in ({"reranker": qwen}, from_path):
        assert library(**reranker, instruction=TASK).rank() == instructed
        assert library(**reranker).rank() == library(**reranker, instruction="").rank() == plain


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_instruction_is_saved(qwen, from_path, library):
    made = library(**from_path, instruction=TASK, min_score=-1000.0).made
    again = pickle.loads(pickle.dumps(made))
    assert again._ranking.arguments() == made._ranking.arguments()
    assert again._ranking.arguments()["instruction"] == TASK
    hits = [(hit.index, hit.score) for hit in again._ranking(QUERY, TEXTS)]
    assert hits == ranked(qwen, instruction=TASK)


def test_an_instruction_is_written_by_haystack_and_llama_index(from_path, qwen):
    haystack = Haystack(**from_path, instruction=TASK, min_score=-1000.0).made
    written = json.loads(json.dumps(haystack.to_dict()))
    assert written["init_parameters"]["instruction"] == TASK
    again = Haystack(**from_path)
    again.made = type(haystack).from_dict(written)
    assert again.rank() == ranked(qwen, instruction=TASK)
    llama_index = LlamaIndex(**from_path, instruction=TASK)
    llama_index.made = type(llama_index.made).from_json(llama_index.made.to_json())
    assert llama_index.rank() == ranked(qwen, instruction=TASK)


@pytest.mark.parametrize("library", [Haystack, Rerankers])
def test_a_call_has_its_own_instruction(qwen, library):
    made = library(qwen, instruction=TASK)
    assert made.rank(instruction="find heat") == ranked(qwen, instruction="find heat")
    assert made.rank(instruction="") == ranked(qwen)
    assert made.rank() == ranked(qwen, instruction=TASK)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_template_without_a_place_refuses_at_once(reranker, tiny_layerwise_path, library):
    for given in ({"reranker": reranker}, {"reranker": str(tiny_layerwise_path), "device": "cpu"}):
        with pytest.raises(ValueError, match=f"has no place for the instruction '{TASK}'"):
            library(**given, instruction=TASK)


@pytest.mark.parametrize("library", LIBRARIES)
def test_min_score_and_score_threshold_are_one(qwen, library):
    every = library(qwen, normalize=True).rank()
    least = every[1][1]
    for name in ("min_score", "score_threshold"):
        assert library(qwen, normalize=True, **{name: least}).rank() == every[:2]
        assert library(qwen, normalize=True, **{name: 1.5}).rank() == []
    with pytest.raises(ValueError, match=r"score_threshold=0.5 and min_score=0.25: give one of them"):
        library(qwen, min_score=0.25, score_threshold=0.5)
    with pytest.raises(ValueError, match="min_score is nan, but must be a number"):
        library(qwen, min_score=float("nan"))
    with pytest.raises(ValueError, match=r"min_score=0.5 beside cascade=\{4: 0.5\}"):
        library(qwen, min_score=0.5, cascade={4: 0.5})


def test_a_call_has_its_own_least_score(qwen):
    ranking = RankingAdapter(qwen, score_threshold=-1000.0)
    every = ranking(QUERY, TEXTS)
    assert len(every) == len(TEXTS)
    for own in ({"score_threshold": every[0].score}, {"min_score": every[0].score}):
        assert ranking(QUERY, TEXTS, **own) == every[:1]
    with pytest.raises(ValueError, match="give one of them"):
        ranking(QUERY, TEXTS, score_threshold=0.5, min_score=0.5)
