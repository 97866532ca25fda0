"""Clients that are slow or rude, and servers that load or end."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
import torch

from flagembedding_matryoshka.serve import Limits, create_app
from flagembedding_matryoshka.serve import protocol as protocols
from flagembedding_matryoshka.serve.protocol import impatient_protocol
from flagembedding_matryoshka.serve.threads import Threads
from tests.serve.conftest import client_of, serving, wait_for

pytestmark = pytest.mark.usefixtures("one_thread")
HEADER = b"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
BODY = {"query": "q", "texts": ["t"]}


def connected(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


@pytest.mark.parametrize("sent", [b"", b"POST /rer", b"POST /rerank HTTP/1.1\r\nHost: x\r\n"])
def test_a_header_that_is_late_closes_the_connection(reranker, sent):
    with serving(create_app(reranker, "tiny"), http=impatient_protocol(0.3, 30, 30)) as address:
        with connected(address) as slow:
            start = time.monotonic()
            for byte in sent:
                slow.sendall(bytes([byte]))
            assert slow.recv(100) == b""
            assert time.monotonic() - start > 0.25
        assert httpx.post(f"{address}/rerank", json=BODY).status_code == 200


def test_a_connection_that_is_kept_is_not_late(reranker):
    app = create_app(reranker, "tiny")
    with serving(app, http=impatient_protocol(0.4, 30, 30)) as address, httpx.Client(base_url=address) as client:
        for _ in range(4):
            assert client.post("/rerank", json=BODY).status_code == 200
            time.sleep(0.15)


def test_a_kept_connection_waits_longer_for_a_request_than_for_its_header(reranker):
    app = create_app(reranker, "tiny")
    protocol = impatient_protocol(0.3, 30, 30)
    with serving(app, http=protocol, timeout_keep_alive=75) as address, connected(address) as slow:
        for _ in range(2):
            slow.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert slow.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(1)
        slow.sendall(b"GET /live HT")
        assert slow.recv(1000) == b""


def test_a_connection_without_a_request_is_closed_in_the_end(reranker):
    app, protocol = create_app(reranker, "tiny"), impatient_protocol(30, 30, 30)
    with serving(app, http=protocol, timeout_keep_alive=0.3) as address, connected(address) as idle:
        idle.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"".join(iter(lambda: idle.recv(1000), b"")).startswith(b"HTTP/1.1 200")


def test_requests_that_a_shutdown_does_not_wait_for_are_told_so(reranker, gate, caplog):
    app, protocol = create_app(reranker, "tiny"), impatient_protocol(30, 30, 30)
    with ThreadPoolExecutor() as pool:
        with serving(app, http=protocol, timeout_graceful_shutdown=0.3) as address:
            answers = [pool.submit(httpx.post, f"{address}/rerank", json=BODY, timeout=30) for _ in range(3)]
            assert gate.entered.wait(10)
            time.sleep(0.3)
            threading.Timer(2, gate.set).start()
        answers = [answer.result() for answer in answers]
    assert [(answer.status_code, answer.headers["retry-after"]) for answer in answers] == [(503, "1")] * 3
    assert all("shutting down" in answer.json()["message"] for answer in answers)
    assert "Traceback" not in caplog.text


def test_a_body_that_is_late_is_told_so(reranker):
    with serving(create_app(reranker, "tiny", Limits(body_seconds=0.3))) as address, connected(address) as slow:
        slow.sendall(HEADER + b"{")
        answer = b"".join(iter(lambda: slow.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.3 seconds" in answer


def test_bodies_that_do_not_come_keep_nobody_out(reranker):
    with client_of(reranker, limits=Limits(requests=4)) as client, ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(connected(str(client.base_url).rstrip("/"))).sendall(HEADER + b"{")
        assert client.post("/rerank", json=BODY).status_code == 200


def test_bodies_that_are_held_open_give_way_to_those_that_arrive(reranker):
    with client_of(reranker, limits=Limits(body_bytes=100, bytes=3200)) as client, ExitStack() as stack:
        address = str(client.base_url).rstrip("/")
        held = [stack.enter_context(connected(address)) for _ in range(40)]
        for connection in held:
            connection.sendall(HEADER + b" " * 90)
        for _ in range(20):
            assert client.post("/rerank", json=BODY | {"query": "q" * 40}).status_code == 200
        oldest = b"".join(iter(lambda: held[0].recv(1000), b""))
        assert oldest.startswith(b"HTTP/1.1 429") and b"too many large requests" in oldest
        assert b"retry-after: 1" in oldest and b"connection: close" in oldest
        held[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            held[-1].recv(1000)
        held[-1].setblocking(True)
        held[-1].sendall(b" " * 10)
        assert held[-1].recv(1000).startswith(b"HTTP/1.1 422"), "a body of spaces has arrived as a whole"


def test_a_half_sent_body_does_not_keep_the_server(reranker):
    """The server ends before header and body are late, which is after the time that pytest gives a test."""
    app, protocol = create_app(reranker, "tiny"), impatient_protocol(900, 900, 900)
    with ExitStack() as stack, serving(app, http=protocol) as address:
        stack.enter_context(connected(address)).sendall(HEADER + b"{")
        stack.enter_context(connected(address)).sendall(b"POST")
        assert httpx.get(f"{address}/health").status_code == 200


def unread(address, size=1_000_000, more=b""):
    """A connection whose client has sent a request that is answered with `size` bytes, and reads nothing."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    body = json.dumps(BODY | {"texts": ["t" * size], "return_text": True}).encode()
    header = b"POST /rerank HTTP/1.1\r\nHost: x\r\n" + more + b"Content-Length: %d\r\n\r\n" % len(body)
    connection.sendall(header + body)
    return connection


def test_a_request_counts_until_its_answer_is_read(reranker):
    app = create_app(reranker, "tiny")
    with serving(app, http=impatient_protocol(30, 30, 30)) as address, httpx.Client(base_url=address) as client:
        with unread(address) as slow:
            wait_for(client, "matryoshka_batch_documents_sum 1.0")
            time.sleep(0.3)
            metrics = client.get("/metrics").text
            assert "matryoshka_queue_requests 1.0" in metrics and "matryoshka_request_bytes 1.0" in metrics
            answer = b""
            while len(answer) < 1_000_000:
                answer += slow.recv(2**20)
            wait_for(client, "matryoshka_queue_requests 0.0")
            assert json.loads(answer.split(b"\r\n\r\n", 1)[1])[0]["text"] == "t" * 1_000_000
        assert "matryoshka_request_bytes 0.0" in client.get("/metrics").text


def aborted(connection):
    """Whether the connection is reset before the whole answer is read."""
    try:
        return sum(map(len, iter(lambda: connection.recv(2**20), b""))) < 1_000_000
    except ConnectionResetError:
        return True


def test_a_client_that_does_not_read_loses_its_connection(reranker):
    app = create_app(reranker, "tiny")
    with (
        serving(app, http=impatient_protocol(30, 30, 0.3)) as address,
        httpx.Client(base_url=address) as client,
        unread(address) as slow,
    ):
        wait_for(client, "matryoshka_batch_documents_sum 1.0")
        wait_for(client, "matryoshka_queue_requests 0.0")
        assert aborted(slow)


def test_the_end_of_a_connection_does_not_wait_for_a_client_that_does_not_read(reranker, monkeypatch):
    """The answer waits in the buffer of the transport, which here has room for it."""
    monkeypatch.setattr(protocols, "GRACE", 0.3)
    app, seen = create_app(reranker, "tiny"), []

    class Noting(impatient_protocol(30, 30, 30)):
        def connection_made(self, transport):
            seen.append(transport)
            super().connection_made(transport)

    with serving(app, http=Noting) as address, httpx.Client(base_url=address) as client, connected(address) as slow:
        wait_for(client, "matryoshka_queue_requests 0.0")
        (transport,) = [one for one in seen if one.get_extra_info("peername") == slow.getsockname()]
        transport.set_write_buffer_limits(high=2**25)
        body = json.dumps(BODY | {"texts": ["t" * 1_000_000], "return_text": True}).encode()
        header = b"POST /rerank HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(header % len(body) + body)
        while not transport.is_closing():
            time.sleep(0.01)
        assert transport.get_write_buffer_size() > 0
        for _attempt in range(200):
            if not transport.get_write_buffer_size():
                break
            time.sleep(0.02)
        assert not transport.get_write_buffer_size()


def test_work_of_a_client_that_has_left_is_not_begun(reranker, monkeypatch):
    entered, leave, tokenized, tokenize = threading.Semaphore(0), threading.Event(), [], reranker.tokenize

    def waiting(pairs, **options):
        tokenized.append(pairs)
        entered.release()
        assert leave.wait(20)
        return tokenize(pairs, **options)

    with client_of(reranker) as client, ThreadPoolExecutor() as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reranker, "tokenize", waiting)
        answers = [pool.submit(client.post, "/rerank", json=BODY) for _ in range(4)]
        for _ in answers:
            assert entered.acquire(timeout=10)
        body = json.dumps(BODY)
        with connected(str(client.base_url).rstrip("/")) as gone:
            gone.sendall(f"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(client, "matryoshka_queue_requests 5.0")
        wait_for(client, 'matryoshka_requests_total{path="/rerank",status="499"} 1.0')
        leave.set()
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert client.post("/rerank", json=BODY).status_code == 200
    assert len(tokenized) == 5


def test_a_server_whose_threads_are_stuck_is_not_ready(reranker, monkeypatch):
    leave, tokenize = threading.Event(), reranker.tokenize
    monkeypatch.setattr("flagembedding_matryoshka.serve.service.STUCK_SECONDS", 0.2)

    def waiting(pairs, **options):
        assert leave.wait(20)
        return tokenize(pairs, **options)

    with client_of(reranker) as client, ThreadPoolExecutor() as pool:
        assert client.get("/ready").status_code == 200
        monkeypatch.setattr(reranker, "tokenize", waiting)
        answer = pool.submit(client.post, "/rerank", json=BODY)
        wait_for(client, "matryoshka_queue_requests 1.0")
        time.sleep(0.3)
        refused = client.get("/ready")
        assert refused.status_code == 503 and "to be tokenised" in refused.json()["message"]
        assert client.get("/live").status_code == 200
        leave.set()
        assert answer.result().status_code == 200
        assert client.get("/ready").status_code == 200


def test_threads_forget_calls_that_are_cancelled():
    async def main():
        threads, started, leave, called = Threads("test", 1), threading.Event(), threading.Event(), []
        first = asyncio.create_task(threads.run(lambda: (started.set(), leave.wait(10))))
        await asyncio.to_thread(started.wait)
        second = asyncio.create_task(threads.run(called.append, 2))
        await asyncio.sleep(0)
        assert threads.seconds_of_oldest > 0
        second.cancel()
        await asyncio.sleep(0)
        leave.set()
        await first
        assert await threads.run(lambda: "third") == "third"
        assert not called and threads.seconds_of_oldest == 0
        threads.close()

    asyncio.run(main())


def test_while_the_model_is_loaded_the_server_lives_and_is_not_ready(reranker):
    loading = Future()
    loading.set_running_or_notify_cancel()
    with serving(create_app(loading, "tiny")) as address, httpx.Client(base_url=address) as client:
        statuses = {path: client.get(path).status_code for path in ("/live", "/ready", "/health", "/info", "/metrics")}
        assert statuses == {"/live": 200, "/ready": 503, "/health": 503, "/info": 503, "/metrics": 200}
        refused = client.post("/rerank", json=BODY)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        loading.set_result(reranker)
        for _attempt in range(200):
            if client.get("/ready").status_code == 200:
                break
            time.sleep(0.02)
        assert client.post("/rerank", json=BODY).status_code == 200


@pytest.fixture
def batches(reranker, monkeypatch):
    """What was computed, batch after batch, and a semaphore that lets a cascade compute its next one."""
    seen, step, scores = [], threading.Semaphore(0), reranker.model.scores

    def noting(states, setting, layers=None):
        if setting.cascade:
            assert step.acquire(timeout=20)
        seen.append("cascade" if setting.cascade else "other")
        return scores(states, setting, layers)

    monkeypatch.setattr(reranker, "max_tokens_per_batch", 100)
    monkeypatch.setattr(reranker.model, "scores", noting)
    return seen, step


CASCADE = {"query": "q", "texts": [f"wing {n} " * 5 for n in range(20)], "cascade": {"3": 0.5}}


def test_a_cascade_lets_others_through(reranker, batches):
    seen, step = batches
    with client_of(reranker) as client, ThreadPoolExecutor() as pool:
        cascade = pool.submit(client.post, "/rerank", json=CASCADE)
        step.release()
        while "cascade" not in seen:
            time.sleep(0.01)
        other = pool.submit(client.post, "/rerank", json=BODY)
        while not other.done():
            step.release()
            time.sleep(0.02)
        assert not cascade.done()
        step.release(1000)
        found = cascade.result().json()
    ranked = reranker.rank("q", CASCADE["texts"], cascade={3: 0.5})
    assert [hit["index"] for hit in found] == [hit["corpus_id"] for hit in ranked]
    assert seen.index("other") < len(seen) - 1


def test_who_hangs_up_stops_a_cascade(reranker, batches):
    seen, step = batches
    with client_of(reranker) as client:
        body = json.dumps(CASCADE)
        with connected(str(client.base_url).rstrip("/")) as gone:
            gone.sendall(f"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            step.release()
            while not seen:
                time.sleep(0.01)
        for _attempt in range(200):
            if 'matryoshka_requests_total{path="/rerank",status="499"} 1.0' in client.get("/metrics").text:
                break
            time.sleep(0.02)
        step.release(1000)
        assert client.post("/rerank", json=BODY).status_code == 200
    assert len(seen) <= 3 and seen[-1] == "other"


@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError("secret"), 503), (MemoryError(), 503), (ArithmeticError("s"), 500)]
)
def test_a_request_that_fails_alone(reranker, monkeypatch, error, status):
    score_lists = reranker.score_lists
    (poison,) = reranker.tokenize(("poison", "a text"))

    def failing(lists, **options):
        if any(pair.lead == poison.lead for pairs in lists for pair in pairs):
            raise error
        return score_lists(lists, **options)

    monkeypatch.setattr(reranker, "score_lists", failing)
    with client_of(reranker) as client, ThreadPoolExecutor() as pool:
        bodies = [BODY | {"query": query} for query in ("poison", *"abcdef")]
        answers = [answer.result() for answer in [pool.submit(client.post, "/rerank", json=body) for body in bodies]]
    assert [answer.status_code for answer in answers] == [status] + [200] * 6
    assert "secret" not in answers[0].text and answers[0].json()["message"] != "internal error"


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_the_servers_fault(reranker, monkeypatch, score):
    scores = reranker.model.scores
    monkeypatch.setattr(reranker.model, "scores", lambda *args: torch.full_like(scores(*args), score))
    with client_of(reranker) as client:
        answer = client.post("/rerank", json=BODY | {"raw_scores": True})
    assert answer.status_code == 500 and "not a number" in answer.json()["message"]


@pytest.mark.parametrize(("given", "taken"), [("abc-1", True), ("a b", False), ("x" * 200, False), (None, False)])
def test_a_request_has_an_id(client, caplog, given, taken):
    with caplog.at_level("INFO", "flagembedding_matryoshka.serve.logs"):
        answer = client.post("/rerank", json=BODY, headers={} if given is None else {"X-Request-ID": given})
        client.get("/health")
    assert (answer.headers["x-request-id"] == given) == taken and answer.headers["x-request-id"]
    (record,) = [record for record in caplog.records if record.name.endswith("serve.logs")]
    assert (record.method, record.path, record.status) == ("POST", "/rerank", 200)


def test_uvicorns_own_shutdown_still_waits(reranker):
    """A request that has arrived is answered though the server is told to end."""
    entered, leave, score_lists = threading.Event(), threading.Event(), reranker.score_lists

    def waiting(*args, **options):
        entered.set()
        assert leave.wait(20)
        return score_lists(*args, **options)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(reranker, "score_lists", waiting)
        with serving(create_app(reranker, "tiny"), http=impatient_protocol(30, 30, 30)) as address:
            answer = pool.submit(httpx.post, f"{address}/rerank", json=BODY, timeout=30)
            assert entered.wait(10)
            threading.Timer(0.3, leave.set).start()
        assert answer.result().status_code == 200
