"""The server before its application is imported."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

import httpx
import pytest
import yaml
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from flagembedding_matryoshka.serve.__main__ import FirstParser, build_parser, main
from flagembedding_matryoshka.serve.starting import Starting
from tests.serve.conftest import wait_for
from tests.serve.test_main import restored_logging, started

BODY = {"query": "lift", "documents": ["air flows", "a wing"]}
GATE = """
    import sys, time
    from importlib.abc import MetaPathFinder
    from pathlib import Path

    class Gate(MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                Path({asked!r}).touch()
                while not Path({opened!r}).exists():
                    time.sleep(0.01)

    sys.meta_path.insert(0, Gate())
"""
"""Python runs this when a process starts. Importing torch then waits for a file."""


class Gate:
    """Lets a process import torch after `open`."""

    def __init__(self, directory):
        self._asked, self._opened = directory / "asked", directory / "opened"
        code = GATE.format(asked=str(self._asked), opened=str(self._opened))
        (directory / "sitecustomize.py").write_text(textwrap.dedent(code))
        self.path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])

    def wait(self):
        """Until the process wants to import torch."""
        while not self._asked.exists():
            time.sleep(0.01)

    def open(self):
        self._opened.touch()


@pytest.fixture
def torch_gate(tmp_path):
    return Gate(tmp_path)


def check_is_starting(client):
    """Whether a server that has not imported its application answers as it should."""
    for method in ("GET", "HEAD"):
        assert client.request(method, "/live").status_code == 200
    assert client.get("/live").json() == {"status": "ok"}
    for answer in (client.get("/ready"), client.get("/nothing"), client.post("/rerank", json=BODY)):
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["message"] == "the model is not loaded yet"
    assert client.get("/live", headers={"X-Request-ID": "own"}).headers["x-request-id"] == "own"


@pytest.mark.slow
@pytest.mark.parametrize("uses_uds", [False, True])
def test_live_is_answered_before_torch_is_imported_and_no_connection_is_lost(
    uses_uds, torch_gate, tmp_path, tiny_layerwise_path
):
    if uses_uds and os.name == "nt":
        pytest.skip("Windows has no Unix sockets in asyncio")
    path = tmp_path / "socket"
    listening = ["--uds", str(path)] if uses_uds else []
    ended = threading.Event()

    def probe(client_of):
        statuses = []
        while not ended.is_set():
            with client_of() as client:
                statuses.append(client.get("/ready").status_code)
            time.sleep(0.05)
        return statuses

    with started(tiny_layerwise_path, "--dtype", "float32", *listening, PYTHONPATH=torch_gate.path) as (
        server,
        address,
    ):
        transport = partial(httpx.HTTPTransport, uds=str(path) if uses_uds else None)

        def client_of():
            return httpx.Client(transport=transport(), base_url=address or "http://localhost", timeout=60)

        with client_of() as client, ThreadPoolExecutor() as pool:
            check_is_starting(client)
            torch_gate.wait()
            check_is_starting(client)
            probing = pool.submit(probe, client_of)
            try:
                torch_gate.open()
                while client.get("/ready").status_code != 200:
                    assert server.poll() is None, server.log
                    assert client.get("/live").status_code == 200
                    time.sleep(0.05)
                assert len(client.post("/rerank", json=BODY).json()["results"]) == 2
            finally:
                ended.set()
            assert set(probing.result()) <= {200, 503}
        server.terminate()
        server.wait(60)
    assert sum("running on" in line for line in server.log) == 1
    assert "Traceback" not in "".join(server.log)
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_hangups_before_the_import_are_one_more_load(torch_gate, tiny_layerwise_path):
    with started(tiny_layerwise_path, "--dtype", "float32", PYTHONPATH=torch_gate.path) as (server, address):
        torch_gate.wait()
        for _ in range(5):
            server.send_signal(signal.SIGHUP)
            assert httpx.get(f"{address}/live").status_code == 200
        torch_gate.open()
        with httpx.Client(base_url=address) as client:
            while client.get("/ready").status_code != 200:
                assert server.poll() is None, server.log
                time.sleep(0.05)
            wait_for(client, 'matryoshka_reloads_total{result="loaded"} 1.0')
            assert client.post("/rerank", json=BODY).status_code == 200
    assert sum("is loaded again" in line for line in server.log) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_import_ends_the_server(number, torch_gate, tmp_path):
    with started(tmp_path / "nothing", PYTHONPATH=torch_gate.path) as (server, address):
        torch_gate.wait()
        assert httpx.get(f"{address}/live").status_code == 200
        server.send_signal(number)
        assert server.wait(20) in (0, -number)
    assert "Traceback" not in "".join(server.log)


def test_the_command_imports_no_model_before_it_listens():
    code = """
        import sys
        from flagembedding_matryoshka.serve.__main__ import FirstParser, Server
        Server(FirstParser().parse_known_args(["--model", "m"])[0], None)
        print(*sys.modules)
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    loaded = found.stdout.split()
    assert "uvicorn" in loaded and not {"torch", "transformers", "FlagEmbedding", "fastapi"} & set(loaded)


async def answers(building, checks, reloads=0):
    """Run `Starting` and, beside it, `checks` with it and a client of it."""
    starting = Starting()
    running = asyncio.create_task(starting.run(building))
    for _ in range(reloads):
        starting.reload()
    transport = httpx.ASGITransport(starting)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await checks(starting, client)
    running.cancel()
    await asyncio.wait([running])
    running.result()


@pytest.mark.parametrize("root_path", ["", "/behind"])
def test_an_application_answers_when_it_is_built(root_path):
    steps, building = [], Future()

    @asynccontextmanager
    async def lifespan(app):
        steps.append("begins")
        yield
        steps.append("ends")

    async def ready(request):
        return PlainTextResponse("ready")

    async def checks(starting, client):
        client._transport.root_path = root_path  # as uvicorn, which puts it before the path
        assert (await client.get(f"{root_path}/live")).json() == {"status": "ok"}
        assert (await client.get(f"{root_path}/ready")).status_code == 503
        assert not steps
        building.set_result((Starlette(routes=[Route("/ready", ready)], lifespan=lifespan), lambda: None))
        while (answer := await client.get(f"{root_path}/ready")).status_code == 503:
            await asyncio.sleep(0.001)
        assert answer.text == "ready" and steps == ["begins"]

    asyncio.run(answers(building, checks))
    assert steps == ["begins", "ends"]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 1)])
def test_reloads_before_the_application_is_built_are_one(before, after):
    building, reloads = Future(), []

    async def checks(starting, client):
        building.set_result((Starlette(), partial(reloads.append, "again")))
        while (await client.get("/nothing")).status_code == 503:
            await asyncio.sleep(0.001)
        assert len(reloads) == after
        starting.reload()
        starting.reload()
        assert len(reloads) == after + 2

    asyncio.run(answers(building, checks, before))


def test_an_error_of_building_is_raised():
    building = Future()
    building.set_exception(ValueError("no such option"))
    with pytest.raises(ValueError, match="no such option"):
        asyncio.run(Starting().run(building))


def test_a_wrong_option_ends_the_server(capsys):
    for words in (["--nothing", "1"], ["--port", "none"]):
        with restored_logging(), pytest.raises(SystemExit) as ended:
            main(["--model", "m", "--port", "0", *words])
        assert ended.value.code == 2
        assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "--model m",
        "--model m --port 1 --ho ::1 --ssl_c c --head 3 --body_s 4 --log json --devices cpu cpu --dtype float32",
        "--cutoff_layers 4 --uds=/run/x --model=m --token --max_documents 7 --forwarded * --no-token",
    ],
)
@pytest.mark.parametrize("config", [{}, {"port": 7, "devices": ["cpu"], "max_bytes": 9, "root_path": "/a"}])
def test_options_of_listening_are_those_of_the_command(line, config, tmp_path):
    words = line.split()
    if config:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        words += ["--config", str(tmp_path / "c.yaml")]
    found, expected = FirstParser().parse_known_args(words)[0], build_parser().parse_args(words)
    assert vars(found).pop("help") is False
    assert vars(found) == {name: getattr(expected, name) for name in vars(found)}
    assert {"model", "port", "uds", "header_seconds", "body_seconds", "log_format"} <= vars(found).keys()


def test_no_option_is_taken_for_an_abbreviation_of_one_of_listening():
    ours, every = (
        {name for one in parser._actions for name in one.option_strings} for parser in (FirstParser(), build_parser())
    )
    assert ours <= every
    assert not [(name, longer) for name in every - ours for longer in ours if longer.startswith(name)]
