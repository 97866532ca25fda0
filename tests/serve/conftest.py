"""A server on localhost, in a thread."""

import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
import httpx
import uvicorn

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.serve import create_app


@contextmanager
def serving(app, **config):
    """The address of a server of `app`."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", **config))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def client_of(reranker, **options):
    with serving(create_app(reranker, "tiny", **options)) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture(scope="session")
def reranker(tiny_layerwise_path):
    """Tests leave it as it is."""
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", max_length=64)


@pytest.fixture(scope="session")
def client(reranker):
    """Of a server with the default limits."""
    with client_of(reranker) as client:
        yield client


@pytest.fixture
def gate(reranker, monkeypatch):
    """Until it is set, the model computes nothing; `gate.entered` is set once it would."""
    gate = threading.Event()
    gate.entered = threading.Event()
    score_lists = reranker.score_lists

    def waiting(lists, **options):
        gate.entered.set()
        assert gate.wait(20)
        return score_lists(lists, **options)

    monkeypatch.setattr(reranker, "score_lists", waiting)
    yield gate
    gate.set()


def wait_for(client, line):
    """Until the metrics have `line`."""
    for _ in range(200):
        if line in client.get("/metrics").text:
            return
        time.sleep(0.02)
    raise AssertionError(f"{line!r} is not in\n{client.get('/metrics').text}")
