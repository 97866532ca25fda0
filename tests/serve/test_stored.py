"""Documents of requests that are ids of stored passages."""

import httpx
import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.serve import Limits, create_app
from flagembedding_matryoshka.serve.__main__ import load_reranker
from tests.serve.conftest import client_of, serving, wait_for

pytestmark = pytest.mark.usefixtures("one_thread")
QUERY = "how does a wing lift"
TEXTS = {
    "a": "the flow of energy",
    "b": "air flows faster over the upper side of a wing.",
    "c": "heat",
    "long": "what is a heat flux? " * 40,
}
STORED = {"store_layer": 2, "compress_ratio": 4}
DOCUMENTS = [{"id": name} for name in TEXTS]
LENGTHS = {"query_max_length": 16, "max_length": 64}


@pytest.fixture(scope="module")
def invariant(tiny_layerwise_path):
    return MatryoshkaReranker(
        str(tiny_layerwise_path), dtype="bfloat16", devices="cpu", batch_invariant=True, **LENGTHS
    )


@pytest.fixture(scope="module")
def path(invariant, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "passages"
    invariant.store(TEXTS, path, **STORED)
    return path


@pytest.fixture(scope="module")
def stored(invariant, path):
    """A client of a server with a store and a cache."""
    with client_of(invariant, limits=Limits(cache_bytes=1_000_000), store=path) as client:
        yield client


def scores(results, name="relevance_score"):
    return {result["index"]: result[name] for result in results}


def post(client, **body):
    answer = client.post("/rerank", json={"query": QUERY, "normalize": False} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client, **body):
    answer = client.post("/rerank", json={"query": QUERY, "documents": DOCUMENTS} | body)
    assert answer.status_code == 422
    return answer.json()["message"]


@pytest.mark.parametrize("options", [{}, {"cutoff_layers": 4}, {"cascade": {"3": 0.5}}, {"deadline_ms": 1e9}])
def test_ids_get_the_scores_of_their_texts(stored, invariant, options):
    answer = post(stored, documents=DOCUMENTS, **options)
    given = dict(options)
    if "cascade" in given:
        given["cascade"] = {3: 0.5}
    ranking = invariant.rank(QUERY, [*TEXTS.values()], **STORED, **given)
    assert [result["index"] for result in answer["results"]] == [hit["corpus_id"] for hit in ranking]
    found, hits = answer["results"], {hit["corpus_id"]: hit for hit in ranking}
    if "cascade" not in given:  # an answer lowers the scores of shallower exits
        assert scores(found) == {place: pytest.approx(hit["score"], abs=2e-6) for place, hit in hits.items()}
    assert {one["index"]: one.get("cutoff_layer") for one in found} == {
        place: hit.get("cutoff_layer") for place, hit in hits.items()
    }
    assert {one["index"] for one in found if one.get("is_truncated")} == {3}


def test_they_are_not_taken_for_each_other_or_for_texts(stored, invariant):
    together = scores(post(stored, documents=DOCUMENTS)["results"])
    for place, document in enumerate(DOCUMENTS):
        for _ in range(2):
            assert scores(post(stored, documents=[document])["results"]) == {0: together[place]}
    texts = scores(post(stored, documents=[*TEXTS.values()])["results"])
    assert texts == pytest.approx(dict(enumerate(invariant.compute_score([(QUERY, text) for text in TEXTS.values()]))))
    assert len({*together.values(), *texts.values()}) == 8


def test_operations_are_those_of_a_store(stored, invariant):
    used = post(stored, documents=DOCUMENTS[:3], return_operations=True)["usage"]
    pairs = [(QUERY, text) for text in list(TEXTS.values())[:3]]
    expected = invariant.estimate_flops(pairs, stored=True, **STORED)
    assert used["operations"] == pytest.approx(expected, rel=0.01)
    assert used["operations"] < invariant.estimate_flops(pairs, **STORED)


def test_a_document_may_have_a_first_stage_score_and_is_returned_as_it_came(stored, invariant):
    documents = [{"id": name, "first_stage_score": place} for place, name in enumerate(TEXTS)]
    results = post(stored, documents=documents, fusion=0.5, return_documents=True)["results"]
    hits = invariant.rank(QUERY, [*TEXTS.values()], first_stage_scores=range(4), fusion=0.5, **STORED)
    assert [result["index"] for result in results] == [hit["corpus_id"] for hit in hits]
    assert all(result["document"] == documents[result["index"]] for result in results)
    of_queries = [{"query": QUERY, "documents": DOCUMENTS}, {"query": "air", "documents": ["air"]}]
    several = stored.post("/rerank", json={"queries": of_queries}).json()
    assert [len(ranking) for ranking in several["rankings"]] == [4, 1]


def test_info_tells_of_the_store(stored, client):
    assert stored.get("/info").json()["store"] == {"passages": 4, "state_quantization": None} | STORED
    assert "store" not in client.get("/info").json()


def test_passages_may_be_stored_in_int8(invariant, tmp_path):
    store = invariant.store(TEXTS, tmp_path, state_quantization="int8", **STORED)
    with client_of(invariant, store=tmp_path) as client:
        assert client.get("/info").json()["store"]["state_quantization"] == "int8"
        found = scores(post(client, documents=DOCUMENTS)["results"])
    ranking = invariant.rank(QUERY, ids=[*TEXTS], store=store)
    assert found == {hit["corpus_id"]: pytest.approx(hit["score"], abs=2e-6) for hit in ranking}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"documents": [{"id": "a"}, {"id": "x"}]}, "documents.1: the store has no passage with the id 'x'."),
        ({"documents": ["heat", {"id": "a"}]}, "documents.0 has a text, but documents.1 an id alone"),
        ({"documents": [{"id": "a", "title": "t"}]}, "documents.0: a document is a string or an object with a string"),
        ({"compress_ratio": 2}, "compress_ratio is 2, but stored passages have 4: leave it out."),
        ({"compress_layers": 3}, "compress_layers is 3, but stored passages have [2]: leave it out."),
        ({"cutoff_layers": 2}, "do not lie above store_layer=2"),
        ({"max_chunks_per_doc": 2}, "leave out max_chunks_per_doc"),
        ({"max_tokens_per_doc": 2}, "leave out max_chunks_per_doc"),
        ({"truncate": False}, "a stored passage is truncated"),
        ({"top_k": 1, "return_documents": True}, "documents.0: return_documents needs a text"),
    ],
)
def test_what_does_not_fit_is_refused(stored, path, body, message):
    said = refused(stored, **body)
    assert message in said and str(path) not in said


def test_without_a_store_ids_are_refused(client):
    assert "documents.0 has an id and no text, but the server has no store" in refused(client)


def test_a_store_of_another_model_is_refused_before_the_server_is_ready(tiny_raw_model_path, path, tmp_path):
    options = {"dtype": "float32", "devices": "cpu", "from_raw": True, **LENGTHS}
    other = MatryoshkaReranker(str(tiny_raw_model_path), **options)
    with pytest.raises(ValueError, match="was made with model="):
        create_app(other, "tiny", store=path)
    with pytest.raises(ValueError, match="was made with model="):
        load_reranker(str(tiny_raw_model_path), Limits(), path, **options)
    with pytest.raises(FileNotFoundError, match="there is no store"):
        create_app(other, "tiny", store=tmp_path / "nothing")


def test_a_passage_that_is_stored_later_is_there_after_a_reload(invariant, tmp_path):
    path = tmp_path / "store"
    invariant.store({"a": "air"}, path, **STORED)
    app = create_app(invariant, "tiny", store=path)

    @app.post("/reload")
    async def reload():
        app.state.service.reload(lambda: invariant)

    with serving(app) as address, httpx.Client(base_url=address) as client:
        invariant.store({"b": "heat"}, path, **STORED)
        documents = [{"id": "a"}, {"id": "b"}]
        assert "the store has no passage with the id 'b'" in refused(client, documents=documents)
        client.post("/reload")
        wait_for(client, 'matryoshka_reloads_total{result="loaded"} 1.0')
        assert len(post(client, documents=documents)["results"]) == 2
