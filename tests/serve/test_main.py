"""The command line, in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from flagembedding_matryoshka.serve.__main__ import API_KEY_VARIABLE, build_parser, read_api_key


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv(API_KEY_VARIABLE, "from the environment")
    assert read_api_key(None) == "from the environment"
    path = tmp_path / "key"
    path.write_text("from the file\n")
    assert read_api_key(path) == "from the file"
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"the API key in .*key is empty"):
        read_api_key(path)
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    with pytest.raises(ValueError, match=f"{API_KEY_VARIABLE} is empty"):
        read_api_key(None)


def test_every_argument_is_explained():
    assert all(action.help for action in build_parser()._actions)


@contextmanager
def process(model, *arguments, **environment):
    """The running command and its address. What it logs goes to `process.log`."""
    command = [sys.executable, "-m", "flagembedding_matryoshka.serve", "--model", str(model), "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment) as running:
        running.log = []
        started = threading.Event()

        def read():
            for line in running.stderr:
                running.log.append(line)
                if "running on" in line:
                    started.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert started.wait(120), running.log
            yield running, re.search(r"http://\S+", "".join(running.log)).group()
        finally:
            running.kill()
            running.wait()
            reader.join()


def in_flight(pool, client):
    """The answers to come of a large request and of two small ones, once the server is seen to hold all three."""

    def ask(count):
        return pool.submit(client.post, "/rerank", json={"query": "wing", "texts": ["air flows faster " * 30] * count})

    def held(count):
        return f"matryoshka_queue_requests {count}.0" in client.get("/metrics").text

    for _attempt in range(5):  # a fast machine may have answered the large one before the others come
        large, small = ask(500), []
        while not large.done():
            if not small and held(1):
                small = [ask(5), ask(5)]
            elif small and held(3):
                return large, *small
            time.sleep(0.01)
    raise AssertionError("three requests were never seen together")


@pytest.mark.slow
def test_requests_in_flight_are_answered_before_the_process_ends(tiny_layerwise_path):
    """SIGTERM comes while a large request is computed and small ones wait behind it, one at a time."""
    arguments = ["--max_batch_tokens", "2000", "--max_batch_requests", "1", "--dtype", "float32"]
    with process(tiny_layerwise_path, *arguments, MATRYOSHKA_API_KEY="key") as (server, address):
        with httpx.Client(base_url=address, headers={"Authorization": "Bearer key"}, timeout=250) as client:
            assert httpx.post(f"{address}/rerank", json={"query": "q", "texts": ["t"]}).status_code == 401
            with ThreadPoolExecutor() as pool:
                answers = in_flight(pool, client)
                server.send_signal(signal.SIGTERM)
                answers = [answer.result() for answer in answers]
        server.wait(30)
        assert [len(answer.json()) for answer in answers] == [500, 5, 5]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
    assert "Traceback" not in "".join(server.log)


@pytest.mark.slow
def test_defaults_of_the_command_line_are_the_rerankers(tiny_layerwise_path):
    from flagembedding_matryoshka import MatryoshkaReranker

    reranker = MatryoshkaReranker(
        str(tiny_layerwise_path), dtype="float32", devices="cpu", max_length=32, template="minicpm"
    )
    texts = ["air flows", "wing " * 50]
    scores = reranker.rank("lift", texts, cutoff_layers=4, compress_layers=[2, 3], compress_ratio=2)
    arguments = [
        "--dtype",
        "float32",
        "--max_length",
        "32",
        "--template",
        "minicpm",
        "--cutoff_layers",
        "4",
        "--compress_layers",
        "2",
        "3",
        "--compress_ratio",
        "2",
    ]
    with process(tiny_layerwise_path, *arguments) as (_, address):
        answer = httpx.post(f"{address}/rerank", json={"query": "lift", "texts": texts, "raw_scores": True})
    assert answer.json() == [
        {"index": hit["corpus_id"], "score": pytest.approx(hit["score"], abs=1e-5)} for hit in scores
    ]
