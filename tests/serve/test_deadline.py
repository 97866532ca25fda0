"""Requests with a deadline, and what the server does under load before it refuses."""

import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as all_done

import pytest

from flagembedding_matryoshka.serve import Limits, create_app
from flagembedding_matryoshka.serve.model import Scorer
from tests.serve.conftest import client_of, wait_for

pytestmark = pytest.mark.usefixtures("one_thread")
QUERY = "how does a wing lift"
DOCUMENTS = ["the flow of energy", "air flows faster over the upper side of a wing.", "", "what is a heat flux? " * 9]
HOUR = 3_600_000
FORMS = [
    ("/rerank", {"query": QUERY, "documents": DOCUMENTS}, lambda answer: answer["results"]),
    ("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_k": 3}, lambda answer: answer["data"]),
    ("/v2/rerank", {"query": QUERY, "texts": DOCUMENTS}, lambda answer: answer),
    ("/score", {"text_1": QUERY, "text_2": DOCUMENTS}, lambda answer: answer["data"]),
]


def exits(results):
    return [result["cutoff_layer"] for result in results]


@pytest.mark.parametrize(("path", "body", "results"), FORMS)
def test_every_form_says_how_deep_each_document_came(client, path, body, results):
    count = body.get("top_k", len(DOCUMENTS))
    for deadline_ms, exit in ((0.001, 2), (HOUR, 6)):
        answer = client.post(path, json=body | {"deadline_ms": deadline_ms})
        assert answer.status_code == 200, answer.text
        assert exits(results(answer.json())) == [exit] * count


def test_scores_are_those_of_the_exit(client, reranker):
    for deadline_ms, exit in ((0.001, 2), (HOUR, 6)):
        body = {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True, "deadline_ms": deadline_ms}
        found = client.post("/rerank", json=body).json()
        expected = reranker.rank(QUERY, DOCUMENTS, cutoff_layers=exit)
        assert [result["index"] for result in found] == [hit["corpus_id"] for hit in expected]
        assert [result["score"] for result in found] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)


def test_beside_depth_width_cascade_and_chunks(client, reranker):
    body = {"query": QUERY, "documents": DOCUMENTS, "deadline_ms": HOUR, "return_operations": True}
    for options, depths in (
        ({"cutoff_layers": 4, "compress_layers": [2], "compress_ratio": 2}, [4] * 4),
        ({"cascade": {"3": 0.5}}, [6, 6, 3, 3]),
        ({"max_chunks_per_doc": 3}, [6] * 4),
    ):
        answer = client.post("/rerank", json=body | options).json()
        assert exits(answer["results"]) == depths
        assert answer["usage"]["operations"] > 0
    hurried = client.post("/rerank", json=body | {"deadline_ms": 0.001}).json()
    pairs = [(QUERY, document) for document in DOCUMENTS]
    assert hurried["usage"]["operations"] < reranker.estimate_flops(pairs)


def test_several_queries_of_a_request_are_all_answered(client):
    body = {"text_1": [QUERY, "wing", "heat"], "text_2": ["air", "flux", "flow"], "deadline_ms": HOUR}
    assert exits(client.post("/score", json=body).json()["data"]) == [6] * 3


@pytest.mark.parametrize("value", [0, -1, True, "50", "NaN"])
def test_what_is_no_time_is_refused(client, value):
    answer = client.post("/rerank", json={"query": "q", "texts": ["t"], "deadline_ms": value})
    assert answer.status_code == 422 and "body.deadline_ms" in answer.json()["message"]
    misspelt = client.post("/rerank", json={"query": "q", "texts": ["t"], "deadline": 1, "deadlin_ms": 50})
    assert misspelt.status_code == 422 and "do you mean 'deadline_ms'?" in misspelt.json()["message"]


def test_time_in_the_queue_counts(reranker, gate):
    with client_of(reranker) as client, ThreadPoolExecutor() as pool:
        body = {"query": QUERY, "texts": DOCUMENTS}
        first = pool.submit(client.post, "/rerank", json=body)
        assert gate.entered.wait(10)
        waiting = pool.submit(client.post, "/rerank", json=body | {"deadline_ms": 200})
        wait_for(client, "matryoshka_queue_requests 2.0")
        time.sleep(0.25)
        gate.set()
        assert all("cutoff_layer" not in result for result in first.result().json())
        assert exits(waiting.result().json()) == [2] * 4


@pytest.fixture
def prepared(monkeypatch):
    """Wait for a number of requests that are tokenised: their depth is chosen, whatever comes later."""
    prepare, tasks = Scorer.prepare, []

    def counting(*args, **options):
        tasks.append(prepare(*args, **options))
        return tasks[-1]

    def wait(count):
        for _ in range(500):
            if len(tasks) >= count:
                return
            time.sleep(0.02)
        raise AssertionError(f"{len(tasks)} of {count} requests are tokenised")

    monkeypatch.setattr(Scorer, "prepare", counting)
    return wait


def test_a_full_queue_sheds_depth_of_those_that_named_none(reranker, gate, prepared):
    limits = Limits(requests=4, degrade_to=3)
    with client_of(reranker, limits=limits) as client, ThreadPoolExecutor() as pool:
        body = {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True}
        early = []
        for count in (1, 2, 3):
            early.append(pool.submit(client.post, "/rerank", json=body | {"cutoff_layers": 6} if count == 2 else body))
            assert gate.entered.wait(10)
            prepared(count)
            assert f"matryoshka_queue_requests {count}.0" in client.get("/metrics").text
        metrics = client.get("/metrics").text
        assert "matryoshka_queue_limit 4.0" in metrics and "matryoshka_degraded_requests_total 0.0" in metrics
        late = pool.submit(client.post, "/rerank", json=body)
        wait_for(client, "matryoshka_queue_requests 4.0")
        assert client.post("/rerank", json=body).status_code == 429
        gate.set()
        all_done([*early, late])
        assert all("cutoff_layer" not in result for answer in early for result in answer.result().json())
        expected = reranker.rank(QUERY, DOCUMENTS, cutoff_layers=3)
        assert exits(late.result().json()) == [3] * 4
        assert [result["index"] for result in late.result().json()] == [hit["corpus_id"] for hit in expected]
        assert "matryoshka_degraded_requests_total 1.0" in client.get("/metrics").text
        assert "cutoff_layer" not in client.post("/rerank", json=body).json()[0]


@pytest.mark.parametrize("named", [{"cutoff_layers": 5}, {"cascade": {"4": 0.5}}, {"deadline_ms": HOUR}])
def test_who_names_a_depth_gets_it_under_load(reranker, gate, prepared, named):
    with client_of(reranker, limits=Limits(requests=3, degrade_to=2)) as client, ThreadPoolExecutor() as pool:
        body = {"query": QUERY, "texts": DOCUMENTS}
        busy = []
        for count in (1, 2):
            busy.append(pool.submit(client.post, "/rerank", json=body))
            prepared(count)
        late = pool.submit(client.post, "/rerank", json=body | named)
        wait_for(client, "matryoshka_queue_requests 3.0")
        gate.set()
        all_done([*busy, late])
        assert 2 not in {result.get("cutoff_layer", 5) for result in late.result().json()}
        assert "matryoshka_degraded_requests_total 0.0" in client.get("/metrics").text


@pytest.mark.parametrize("exit", [1, 6, 7])
def test_an_exit_that_saves_nothing_is_refused_at_the_start(reranker, exit):
    with pytest.raises(ValueError, match=rf"degrade_to is {exit}, .* shallower than 6 layers: one of \[2, 3, 4, 5\]"):
        create_app(reranker, "tiny", Limits(degrade_to=exit))


def test_the_document_tells_of_deadlines(client):
    document = client.get("/openapi.json").json()
    for path in ("/rerank", "/score"):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for form in schema.get("anyOf", [schema]):
            number, _ = form["properties"]["deadline_ms"]["anyOf"]
            assert number == {"type": "number", "exclusiveMinimum": 0}
