"""A model that replaces another one while the server runs."""

import gc
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import httpx
import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.fingerprint import model_fingerprint
from flagembedding_matryoshka.serve import Limits, create_app
from tests.serve.conftest import serving, wait_for

pytestmark = pytest.mark.usefixtures("one_thread")
BODY = {"query": "how does a wing lift", "texts": ["the flow of energy", "air flows faster"], "raw_scores": True}
FINGERPRINT = "x-model-fingerprint"
LOADED, FAILED = (f'matryoshka_reloads_total{{result="{result}"}} 1.0' for result in ("loaded", "failed"))


@contextmanager
def reloading(reranker, load, limits=None):
    """A client of a server that loads again at POST /reload."""
    app = create_app(reranker, "tiny", limits)
    del reranker

    @app.post("/reload")
    async def reload():
        app.state.service.reload(load)

    with serving(app) as address, httpx.Client(base_url=address) as client:
        yield client


def loaded(path, seed=None):
    """A re-ranker, with other weights of its norm for each seed."""
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu", max_length=64)
    if seed is not None:
        torch.manual_seed(seed)
        torch.nn.init.normal_(reranker.model.model.norm.weight)
    return reranker


def scores(reranker):
    found = reranker.compute_score([(BODY["query"], text) for text in BODY["texts"]])
    return {number: pytest.approx(score, abs=1e-5) for number, score in enumerate(found)}


def answered(answer):
    assert answer.status_code == 200, answer.text
    return {hit["index"]: hit["score"] for hit in answer.json()}


def test_another_model_answers_and_the_former_ones_memory_is_released(tiny_layerwise_path):
    models = [loaded(tiny_layerwise_path), loaded(tiny_layerwise_path, seed=1)]
    expected, fingerprints = list(map(scores, models)), list(map(model_fingerprint, models))
    assert fingerprints[0] != fingerprints[1]
    weights = weakref.ref(next(models[0].model.parameters()))
    with reloading(models.pop(0), models.pop) as client:
        for number in range(2):
            answer = client.post("/rerank", json=BODY)
            assert answered(answer) == expected[number]
            assert answer.headers[FINGERPRINT] == fingerprints[number]
            for path in ("/ready", "/info"):
                assert client.get(path).json()["fingerprint"] == fingerprints[number]
            metrics = client.get("/metrics").text
            assert f'matryoshka_model_info{{fingerprint="{fingerprints[number]}"}} 1.0' in metrics
            assert metrics.count("matryoshka_model_info{") == 1
            if number == 0:
                gc.disable()  # as `load_reranker` leaves nothing for it
                try:
                    client.post("/reload")
                    wait_for(client, LOADED)
                    assert weights() is None
                finally:
                    gc.enable()


def test_requests_that_are_tokenised_are_computed_by_the_former_model(reranker, gate, tiny_layerwise_path):
    """They go on in their queue, and later ones come after them."""
    other = loaded(tiny_layerwise_path, seed=1)
    expected, of_other = scores(reranker), scores(other)
    with reloading(reranker, lambda: other) as client, ThreadPoolExecutor() as pool:
        waiting = [pool.submit(client.post, "/rerank", json=BODY) for _ in range(3)]
        assert gate.entered.wait(10)
        wait_for(client, "matryoshka_queue_requests 3.0")
        client.post("/reload")
        wait_for(client, f'matryoshka_model_info{{fingerprint="{model_fingerprint(other)}"}} 1.0')
        later = pool.submit(client.post, "/rerank", json=BODY)
        wait_for(client, "matryoshka_queue_requests 4.0")
        assert LOADED not in client.get("/metrics").text, "the former model is still in use"
        gate.set()
        assert [answered(answer.result()) for answer in waiting] == [expected] * 3
        assert answered(later.result()) == of_other
        wait_for(client, LOADED)


def test_a_model_that_cannot_be_loaded_changes_nothing(reranker, tiny_layerwise_path, caplog):
    def load():
        if not attempts:
            attempts.append("the second one has no such exit")
            raise FileNotFoundError("no weights")
        return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", max_layer=3)

    attempts = []
    with reloading(reranker, load, Limits(degrade_to=3)) as client:
        before = client.post("/rerank", json=BODY)
        for count in ("1.0", "2.0"):
            client.post("/reload")
            wait_for(client, FAILED.replace("1.0", count))
            after = client.post("/rerank", json=BODY)
            assert after.json() == before.json()
            assert after.headers[FINGERPRINT] == before.headers[FINGERPRINT]
            assert client.get("/ready").status_code == 200
    assert "stays as it was: no weights" in caplog.text
    assert "stays as it was: degrade_to is 3, but must be an exit shallower than" in caplog.text


def test_calls_while_a_load_runs_are_one_more_load(tiny_layerwise_path):
    """Those of the first load, too."""
    loads, permits, first = [], threading.Semaphore(0), Future()

    def load(number):
        loads.append(number)
        assert permits.acquire(timeout=20)
        return loaded(tiny_layerwise_path)

    app = create_app(first, "tiny")

    @app.post("/reload/{number}")
    async def reload(number: int):
        app.state.service.reload(partial(load, number))

    with serving(app) as address, httpx.Client(base_url=address) as client:

        def reload_by(*numbers):
            for number in numbers:
                assert client.post(f"/reload/{number}").status_code == 200

        def wait_for_loads(count):
            wait_for(client, LOADED.replace("1.0", f"{count}.0"))

        reload_by(0, 1, 2)
        assert not loads
        first.set_result(loaded(tiny_layerwise_path))
        while not loads:
            time.sleep(0.01)
        reload_by(3, 4, 5)
        permits.release(2)
        wait_for_loads(2)
        reload_by(6)
        permits.release()
        wait_for_loads(3)
        assert loads == [2, 5, 6]


@pytest.mark.slow
def test_worker_processes_of_the_former_model_end(tiny_layerwise_path):
    def load():
        return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices=["cpu", "cpu"])

    reranker = load()
    scores(reranker)  # starts the workers
    with reloading(reranker, load) as client:
        client.timeout = 120
        assert client.post("/rerank", json=BODY).status_code == 200
        processes = [worker.process for worker in reranker._engine._workers]
        assert len(processes) == 2 and all(process.is_alive() for process in processes)
        client.post("/reload")
        wait_for(client, LOADED)
        assert not any(process.is_alive() for process in processes)
        assert client.post("/rerank", json=BODY).status_code == 200
