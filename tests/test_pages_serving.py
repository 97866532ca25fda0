"""The server, the requests, the key and the Dockerfile of docs/serving.md."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from inspect import signature

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
import httpx

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.serve.__main__ import build_parser
from tests.pages import PAGES, blocks, commands
from tests.shipped import needs_smollm2

PAGE = "docs/serving.md"
COMMANDS = [shlex.split(command) for command in commands(PAGE)]
SERVE = ["flagembedding-matryoshka", "serve"]
NOTHING = ("no limit", "off", "none", "by `--host`", "`MATRYOSHKA_API_KEY` in the environment")
"""What the table of options calls a default that is none."""
ADDRESS = "http://127.0.0.1:8000"


def curl_requests():
    """(path, headers, body) of each curl command."""
    for name, url, *words in COMMANDS:
        if name == "curl":
            options = dict(zip(words[::2], words[1::2], strict=True))
            headers = dict([options["-H"].split(": ")]) if "-H" in options else {}
            yield url.removeprefix(ADDRESS), headers, options["-d"]


@contextmanager
def serving(command, directory):
    """A client of the server that a command of the page starts, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "flagembedding_matryoshka", *command[1:], "--port", str(port)]
    process = subprocess.Popen(words, cwd=directory, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            while not is_ready(client):
                assert process.poll() is None
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait()


def is_ready(client):
    try:
        return client.get("/ready").status_code == 200
    except httpx.ConnectError:
        return False


def test_the_table_has_the_options_and_their_defaults():
    options = vars(build_parser().parse_args(["--model", "smollm2"]))
    of_model = {"model", "config", *signature(MatryoshkaReranker).parameters}
    expected = {name: value for name, value in options.items() if name not in of_model}
    (table,) = re.findall(r"\| option \| default \| meaning \|\n.*\n((?:\| .*\n)+)", PAGES[PAGE])
    shown = {}
    for cell, defaults, _ in re.findall(r"\| (.*?) \| (.*?) \| (.*) \|", table):
        names = re.findall(r"`--(\w+)`", cell)
        shown |= zip(names, defaults.split(", ") if len(names) > 1 else [defaults], strict=True)
    assert shown.keys() == expected.keys()
    for name, default in shown.items():
        value = expected[name]
        texts = (f"{value}",) if value else NOTHING
        assert default.replace(",", "") in texts or float(default.replace(",", "")) == value, name


def test_the_dockerfile_installs_and_starts_the_server_of_the_first_block():
    (dockerfile,) = blocks(PAGE, "dockerfile")
    *installed, started = blocks(PAGE, "bash")[0].splitlines()
    for line in installed:
        words = re.sub(r"\s+#.*", "", line).replace("pip install", "RUN pip install --no-cache-dir")
        assert words in dockerfile.splitlines()
    command = json.loads(re.search(r"^CMD (.*)$", dockerfile, re.MULTILINE)[1])
    assert command == [*started.split(), "--host", "0.0.0.0"]
    options = build_parser().parse_args(command[2:])
    assert f"EXPOSE {options.port}\n" in dockerfile
    (loading,) = re.findall(r'^RUN python -c "(.*)"$', dockerfile, re.MULTILINE)
    compile(loading, PAGE, "exec")


@needs_smollm2
@pytest.mark.slow
def test_the_requests_get_the_answers_that_the_page_shows(tmp_path):
    open_server, keyed_server, cached_server = (command for command in COMMANDS if command[:2] == SERVE)
    plain, half, authorized, several = curl_requests()
    with serving(open_server, tmp_path) as client:
        for (path, headers, body), block in zip((plain, half), blocks(PAGE, "json"), strict=False):
            answer, shown = client.post(path, headers=headers, content=body).json(), json.loads(block)
            for hit, expected in zip(answer["results"], shown["results"], strict=True):
                assert hit == pytest.approx(expected, abs=0.03)
            assert {name: answer[name] for name in shown} | {"id": 0, "results": 0} == shown | {"id": 0, "results": 0}
        path, headers, body = several
        (shown,) = (json.loads(block) for block in blocks(PAGE, "json") if "rankings" in block)
        for results, expected in zip(
            client.post(path, content=body).json()["rankings"], shown["rankings"], strict=True
        ):
            assert results == [pytest.approx(hit, abs=0.03) for hit in expected]
    with serving(cached_server, tmp_path) as client:
        for _ in range(2):
            path, headers, body = plain
            assert client.post(path, content=body).status_code == 200
        assert 'matryoshka_cache_pairs_total{result="found"} 2.0' in client.get("/metrics").text
    (tmp_path / "key.txt").write_text("secret")
    with serving(keyed_server, tmp_path) as client:
        path, headers, body = authorized
        assert client.post(path, content=body).status_code == 401
        assert client.post(path, headers=headers, content=body).status_code == 200
