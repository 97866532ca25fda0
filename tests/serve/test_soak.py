"""Everything at once, for ten minutes or as many seconds as MATRYOSHKA_SOAK_SECONDS says: against a server with two
workers on CPUs go rankings, cascades, widths, chunks, many fields of documents, many queries of a body, scores of many
queries, deadlines behind cascades, faults, and clients that hang up or do not read their answer. Meanwhile its workers
are killed one after the other, and the model is loaded again and again.

No answer is wrong, no request is lost, memory is flat, and nothing is left behind."""

import collections
import contextlib
import json
import os
import random
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from tests.inference.pool.test_pool import SHARED_MEMORY, eventually, gone
from tests.serve.test_main import process

SECONDS = float(os.environ.get("MATRYOSHKA_SOAK_SECONDS", "600"))
CLIENTS = 6
SECONDS_BETWEEN_DEATHS = 3.0
SECONDS_BETWEEN_RELOADS = 5.0
MEBIBYTES = 48
"""That server and workers may have grown by at the end."""
WORDS = "how does a wing lift air flows faster over the upper side what is a heat flux at a blunt nose"
DEPTHS_AND_WIDTHS = [
    {},
    {"cutoff_layers": 3},
    {"compress_layers": [2], "compress_ratio": 2},
    {"cutoff_layers": [5], "compress_layers": [2, 3], "compress_ratio": 4},
    {"cascade": {3: 0.5}},
    {"cascade": {2: 0.6, 4: 0.2}},
    {"cascade": {3: 0.3}, "compress_layers": [2], "compress_ratio": 2},
]
FAULTS = [
    (b"{", 422),
    (b'{"query": "q", "documents": [[], []]}', 422),
    (b'{"query": "q", "documents": ["d"], "cutoff_layers": 99}', 422),
    (b'{"query": "q", "documents": ["d"], "cascade": {"3": 2}}', 422),
    (b'{"query": "q", "documents": ["d"], "truncate_prompt_tokens": 1}', 422),
    (json.dumps({"query": "q", "texts": ["d"] * 401}).encode(), 422),
    (json.dumps({"query": "q", "documents": [{"d": ""}] * 400, "rank_fields": ["d"] * 4000}).encode(), 422),
]
DEADLINES = [(3, 5), (3, 100), (3, 2000), (50, 5), (50, 100), (50, 2000)]
"""(number of documents, milliseconds) of requests with a deadline. Each comes with a cascade to wait behind."""
WIDE = 32
"""Most fields of a document that are ranked."""
UNREAD = json.dumps({"query": "q", "texts": ["wing " * 60_000], "return_text": True}).encode()
"""A request with an answer that the operating system does not take as a whole."""
ANSWER_SECONDS = 1.0


def requests(reranker, dice):
    """(path, body, what the re-ranker finds alone for each document) of some requests of every kind."""

    def text(most):
        return " ".join(dice.choices(WORDS.split(), k=dice.randint(1, most)))

    def texts(count):
        return [f"{text(60)} {place}" for place in range(count)]

    def alone(query, documents, **options):
        return {hit.pop("corpus_id"): hit for hit in reranker.rank(query, documents, **options)}

    for number in range(12 * len(DEPTHS_AND_WIDTHS)):
        asked = DEPTHS_AND_WIDTHS[number % len(DEPTHS_AND_WIDTHS)]
        query = text(10)
        documents = texts(dice.choice([1, 3, 20, 100]))
        body = {"query": query, "raw_scores": True} | asked
        kind = number % 4
        if number % 12 == 0 and "cascade" not in asked:
            queries = [text(10) for _ in documents]
            scores = reranker.compute_score(list(zip(queries, documents, strict=True)), **asked)
            pairs = {"text_1": queries, "text_2": documents, "raw_scores": True}
            yield "/score", pairs | asked, [{place: {"score": score} for place, score in enumerate(scores)}]
            continue
        if kind == 0 and "cascade" not in asked:
            scores = reranker.compute_score([(query, document) for document in documents], **asked)
            pairs = {"text_1": query, "text_2": documents, "raw_scores": True}
            yield "/score", pairs | asked, [{place: {"score": score} for place, score in enumerate(scores)}]
            continue
        chunks = {"overlap": 3} if kind == 1 else {}
        form = "texts" if kind == 2 else "documents"
        expected = alone(query, documents, chunk=kind == 1, **chunks, **asked)
        yield "/rerank", body | {form: documents} | chunks, [expected]
    for asked in DEPTHS_AND_WIDTHS:
        lists = [(text(10), texts(dice.choice([0, 1, 12]))) for _ in range(30)]
        queries = [{"query": query, "documents": documents} for query, documents in lists]
        expected = [alone(*one, **asked) for one in lists]
        yield "/rerank", {"queries": queries, "raw_scores": True} | asked, expected
        query, wide = text(10), [{f"field {name}": text(2) for name in range(WIDE)} for _ in range(40)]
        fields = dice.sample(sorted(wide[0]), WIDE)
        body = {"query": query, "documents": wide, "rank_fields": fields, "raw_scores": True} | asked
        joined = ["\n".join(document[field] for field in fields) for document in wide]
        yield "/rerank", body, [alone(query, joined, **asked)]
    for count, deadline_ms in DEADLINES:
        query, documents = text(10), texts(count)
        body = {"query": query, "documents": documents, "deadline_ms": deadline_ms, "raw_scores": True}
        of_exits = {exit: alone(query, documents, cutoff_layers=exit) for exit in reranker.config.exit_layers}
        yield "/rerank", body, [{place: {exit: own[place] for exit, own in of_exits.items()} for place in range(count)}]
        query, documents = text(10), texts(300)
        body = {"query": query, "documents": documents, "raw_scores": True, "cascade": {3: 0.5}}
        yield "/rerank", body, [alone(query, documents, cascade={3: 0.5})]


def check(answer, path, body, expected):
    """An answer of 200 says of each document of each query what the re-ranker says alone."""
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if "queries" in body:
        lists = found["rankings"]
    else:
        lists = [found["data"] if path == "/score" else found if "texts" in body else found["results"]]
    for hits, of_query in zip(lists, expected, strict=True):
        assert sorted(hit["index"] for hit in hits) == sorted(of_query)
        for hit in hits:
            alone = of_query[hit["index"]]
            if "deadline_ms" in body:
                alone = {"cutoff_layer": hit["cutoff_layer"]} | alone[hit["cutoff_layer"]]
            score = hit.get("score", hit.get("relevance_score"))
            assert score == pytest.approx(alone["score"], abs=1e-5), (body, hit, alone)
            unknown = {"score"} | ({"is_truncated"} if path == "/score" else set())
            for name in {*alone, "cutoff_layer", "chunk"} - unknown:
                assert hit.get(name) == alone.get(name), (body, hit, alone)


class Load:
    """Clients that send what `pool` has, and faults, and hang up.

    Attributes:
        answered: how many answers had which status.
        gone: how many clients went away, in the middle of their body or without waiting for the answer.
    """

    def __init__(self, address, pool):
        self.address = address
        self.pool = pool
        self.answered = collections.Counter()
        self.gone = 0
        self._counting = threading.Lock()
        self._unread = []

    def run(self, seconds, seed):
        """Raises what a client met."""
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS) as clients:
            for done in [clients.submit(self._client, end, seed * CLIENTS + n) for n in range(CLIENTS)]:
                done.result()

    def _client(self, end, seed):
        dice = random.Random(seed)
        with httpx.Client(base_url=self.address, timeout=60) as client:
            while time.monotonic() < end:
                path, body, expected = dice.choice(self.pool)
                fate = dice.random()
                if fate < 0.1:
                    self._hang_up(path, json.dumps(body).encode(), dice)
                    continue
                if fate < 0.12:
                    self._read_nothing()
                    continue
                if fate < 0.2:
                    content, status = dice.choice(FAULTS)
                    answer = client.post("/rerank", content=content)
                    assert answer.status_code == status, answer.text
                else:
                    answer = client.post(path, json=body)
                    check(answer, path, body, expected)
                with self._counting:
                    self.answered[answer.status_code] += 1

    def _read_nothing(self):
        host, port = self.address.removeprefix("http://").split(":")
        header = f"POST /rerank HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(UNREAD)}\r\n\r\n".encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect((host, int(port)))
        connection.sendall(header + UNREAD)
        with self._counting:
            self.gone += 1
            self._unread.append(connection)  # it stays open

    def _hang_up(self, path, body, dice):
        host, port = self.address.removeprefix("http://").split(":")
        header = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(header + body[: dice.choice([0, len(body) // 2, len(body), len(body)])])
            time.sleep(dice.choice([0, 0.01, 0.1]))
        with self._counting:
            self.gone += 1


def workers_of(server):
    """Its worker processes; there is another that multiprocessing starts for itself."""
    workers = []
    for child in server.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a former model's, which has just ended
            if "spawn_main" in " ".join(child.cmdline()):
                workers.append(child)
    return workers


def has_model(worker):
    """Whether it maps the weights that all share."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "/torch_" in Path(f"/proc/{worker.pid}/maps").read_text()
    return False


def kill_workers(server, seen, stop):
    """Kill one after the other, if there are two that work. `seen` gets the ids of all."""
    deaths = 0
    while not stop.wait(SECONDS_BETWEEN_DEATHS):
        workers = workers_of(server)
        seen.update(worker.pid for worker in workers)
        if len(workers) == 2 and all(map(has_model, workers)):
            with contextlib.suppress(psutil.NoSuchProcess):
                workers[deaths % 2].kill()
                deaths += 1
    return deaths


def reloads_of(address):
    """How many models the server has loaded in place of another one."""
    found = re.search(r'^matryoshka_reloads_total{result="loaded"} (\S+)', httpx.get(f"{address}/metrics").text, re.M)
    return 0 if found is None else int(float(found[1]))


def reload_models(running, address, stop):
    """Load the model again and again, each time after the one before is in use and the former is released."""
    while not stop.wait(SECONDS_BETWEEN_RELOADS):
        before = reloads_of(address)
        running.send_signal(signal.SIGHUP)
        assert eventually(lambda before=before: reloads_of(address) == before + 1, seconds=120), running.log
    return reloads_of(address)


def resident(server):
    """Bytes of the server and its workers."""
    workers = workers_of(server)
    assert len(workers) == 2
    return sum(one.memory_info().rss for one in [server, *workers])


def requests_by_status(address):
    text = httpx.get(f"{address}/metrics").text
    assert "matryoshka_queue_requests 0.0" in text and "matryoshka_request_bytes 0.0" in text
    counted = collections.Counter()
    for status, number in re.findall(r'^matryoshka_requests_total{path="[^"]+",status="(\d+)"} (\S+)', text, re.M):
        counted[int(status)] += float(number)
    return counted


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.skipif(not Path("/proc").is_dir() or not SHARED_MEMORY.exists(), reason="looks at processes as Linux does")
def test_soak(tiny_layerwise_path, record_property):
    alone = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", max_length=64)
    pool = list(requests(alone, random.Random(0)))
    files, seen = set(SHARED_MEMORY.iterdir()), set()
    arguments = ["--dtype", "float32", "--max_length", "64", "--devices", "cpu", "cpu", "--max_documents", "400"]
    arguments += ["--answer_seconds", str(ANSWER_SECONDS)]
    with process(tiny_layerwise_path, *arguments) as (running, address), ThreadPoolExecutor(2) as others:
        server, load, stop = psutil.Process(running.pid), Load(address, pool), threading.Event()
        load.run(SECONDS / 4, seed=0)
        before = resident(server)
        killing = others.submit(kill_workers, server, seen, stop)
        reloading = others.submit(reload_models, running, address, stop)
        try:
            load.run(SECONDS / 2, seed=1)
        finally:
            stop.set()
        deaths, reloads = killing.result(), reloading.result()
        load.run(SECONDS / 4, seed=2)  # those that are new have warmed up, too
        after = resident(server)
        seen.update(worker.pid for worker in server.children())
        time.sleep(2 * ANSWER_SECONDS)
        counted = requests_by_status(address)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) in (0, -signal.SIGTERM)
    found = {"answered": dict(load.answered), "gone": load.gone, "deaths": deaths, "reloads": reloads}
    found["grown"] = (after - before) / 2**20
    record_property("soak", found)
    print(found)
    assert deaths >= SECONDS / 60
    assert reloads >= SECONDS / 60
    assert load.answered[200] > 10 * deaths
    assert counted[422] == load.answered[422]
    assert set(counted) <= {200, 422, 499}
    assert counted[200] + counted[499] == load.answered[200] + load.gone
    assert after - before < MEBIBYTES * 2**20
    assert "Traceback" not in "".join(running.log)
    assert eventually(lambda: all(map(gone, seen)))
    assert eventually(lambda: not set(SHARED_MEMORY.iterdir()) - files)
