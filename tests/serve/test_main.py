"""The command line, in a process of its own."""

import gc
import inspect
import json
import logging.config
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields

import httpx
import pytest
import uvicorn
from asgi_correlation_id import correlation_id
from safetensors.torch import load, save_file
from transformers.utils import logging as transformers_logging

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.arguments import given_options
from flagembedding_matryoshka.serve import Limits, create_app
from flagembedding_matryoshka.serve.__main__ import (
    API_KEY_VARIABLE,
    OF_LIMITS,
    OF_UVICORN,
    WITHOUT,
    build_parser,
    load_reranker,
    main,
    read_api_keys,
)
from flagembedding_matryoshka.serve.logs import log_config
from tests.qwen import write_causal_lm
from tests.serve.conftest import wait_for


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert read_api_keys(None) is None
    monkeypatch.setenv(API_KEY_VARIABLE, " from the environment ")
    assert read_api_keys(None).name_of(b"from the environment") == "key"
    path = tmp_path / "key"
    path.write_text("clé-voilà\n", encoding="utf-8")
    assert read_api_keys(path).name_of("clé-voilà".encode()) == "key"
    assert read_api_keys(path).name_of(b"from the environment") is None
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"the API key in .*key is empty"):
        read_api_keys(path)
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    with pytest.raises(ValueError, match=f"{API_KEY_VARIABLE} is empty"):
        read_api_keys(None)


def test_a_network_without_a_key_is_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        with restored_logging(), pytest.raises((OSError, ValueError)):
            main(["--model", str(tmp_path / "nothing"), "--port", "0", "--host", host])
        assert ("without an API key" in capsys.readouterr().err) is warned


def test_every_argument_is_explained():
    assert all(action.help for action in build_parser()._actions)
    build_parser().format_help()


def test_the_command_line_takes_what_the_class_takes():
    taken = {action.dest for action in build_parser()._actions}
    assert set(inspect.signature(MatryoshkaReranker).parameters) - taken == {"model_name_or_path", *WITHOUT}
    line = (
        "--model m --quantization int8 --budget 0.5 --template minicpm --instruction task --query_max_length 9 "
        "--start_layer 2 --compress_layers 2 3 --cutoff_layers 4 --peft_path a b --no-from_raw --use_bf16 "
        "--max_batch_tokens 7 --fusion 0.5"
    )
    assert given_options(build_parser().parse_args(line.split())) == {
        "quantization": "int8",
        "budget": 0.5,
        "template": "minicpm",
        "instruction": "task",
        "query_max_length": 9,
        "start_layer": 2,
        "compress_layers": [2, 3],
        "cutoff_layers": [4],
        "peft_path": ["a", "b"],
        "from_raw": False,
        "use_bf16": True,
        "max_tokens_per_batch": 7,
        "fusion": 0.5,
    }
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--model", "m", "--quantization", "int3"])


def test_options_of_the_server_reach_uvicorn_and_the_limits():
    options = build_parser().parse_args(["--model", "m"])
    assert Limits(**{name: getattr(options, option) for name, option in OF_LIMITS.items()}) == Limits()
    assert set(OF_LIMITS) == {field.name for field in fields(Limits)}
    line = "--model m --max_bytes 9000000 --max_documents 7 --degrade_to 3 --uds /run/x --root_path /a --port 1"
    options = build_parser().parse_args([*line.split(), "--keep_alive_seconds", "9", "--ssl_certfile", "c"])
    assert Limits(**{name: getattr(options, option) for name, option in OF_LIMITS.items()}) == Limits(
        7, bytes=9_000_000, degrade_to=3
    )
    config = uvicorn.Config(create_app, **{name: getattr(options, option) for name, (option, *_) in OF_UVICORN.items()})
    assert (config.uds, config.root_path, config.port, config.timeout_keep_alive) == ("/run/x", "/a", 1, 9)
    assert config.ssl_certfile == "c" and config.timeout_graceful_shutdown == 30
    with pytest.raises(ValueError, match="max_bytes is 1, less than max_body_bytes"):
        Limits(bytes=1)


def test_what_is_loaded_is_no_burden_of_the_garbage_collector(tiny_layerwise_path):
    before = gc.get_freeze_count()
    try:
        reranker = load_reranker(str(tiny_layerwise_path), Limits(), dtype="float32", devices="cpu")
        assert gc.get_freeze_count() > before + 10_000
        assert len(gc.get_objects()) < 10_000
        assert reranker.compute_score([("q", "t")])
    finally:
        gc.unfreeze()


def test_what_cannot_be_loaded_ends_the_server(tmp_path):
    with restored_logging(), pytest.raises((OSError, ValueError), match=str(tmp_path)):
        main(["--model", str(tmp_path / "nothing"), "--port", "0"])


def test_an_exit_to_degrade_to_that_there_is_not_ends_the_server(tiny_layerwise_path):
    arguments = ["--model", str(tiny_layerwise_path), "--port", "0", "--degrade_to", "99"]
    with restored_logging(), pytest.raises(ValueError, match="degrade_to is 99, but must be an exit shallower than 6"):
        main(arguments)


def test_a_cache_of_scores_that_depend_on_their_batch_ends_the_server(tmp_path):
    """Before the model is looked for."""
    arguments = ["--model", str(tmp_path / "nothing"), "--port", "0", "--cache_bytes", "1000000"]
    with restored_logging(), pytest.raises(ValueError, match=r"cache_bytes is 1000000, but .*: give batch_invariant"):
        main(arguments)


@pytest.mark.parametrize("json_lines", [True, False])
def test_lines_of_the_log(json_lines, capsys):
    with restored_logging():
        logging.config.dictConfig(log_config(json_lines))
        token = correlation_id.set("id-1")
        logging.getLogger("flagembedding_matryoshka.serve").info("a %s", "message", extra={"seconds": 2})
        correlation_id.reset(token)
    line = capsys.readouterr().err.strip()
    if json_lines:
        fields = json.loads(line)
        assert fields["message"] == "a message" and fields["request_id"] == "id-1" and fields["seconds"] == 2
    else:
        assert line == "INFO: a message [flagembedding_matryoshka.serve id-1]"


@contextmanager
def restored_logging():
    """The root's handlers and the levels of loggers are as before."""
    root, loggers = logging.getLogger(), list(map(logging.getLogger, log_config(False)["loggers"]))
    before, levels = (root.handlers[:], root.level), [logger.level for logger in loggers]
    try:
        yield
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        logging.captureWarnings(False)
        transformers_logging.enable_default_handler()
        transformers_logging.disable_propagation()


@contextmanager
def started(model, *arguments, **environment):
    """The running command as soon as it listens, and its address. What it logs goes to `log`."""
    command = [sys.executable, "-m", "flagembedding_matryoshka.serve", "--model", str(model), "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment) as running:
        running.log = []
        listens = threading.Event()

        def read():
            for line in running.stderr:
                running.log.append(line)
                if "running on" in line:
                    listens.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert listens.wait(120), running.log
            yield running, next(iter(re.findall(r"http://[\d.:]+", "".join(running.log))), None)
        finally:
            running.kill()
            running.wait()
            reader.join()


@contextmanager
def process(model, *arguments, **environment):
    """The same as soon as it is ready."""
    with started(model, *arguments, **environment) as (running, address):
        while httpx.get(f"{address}/ready").status_code != 200:
            assert running.poll() is None, running.log
            assert httpx.get(f"{address}/live").status_code == 200
            time.sleep(0.05)
        yield running, address


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
        server.wait(40)
        assert [len(answer.json()) for answer in answers] == [500, 5, 5]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
    assert "Traceback" not in "".join(server.log)


@pytest.mark.slow
def test_an_interrupt_ends_the_server_without_a_traceback(tiny_layerwise_path):
    with process(tiny_layerwise_path, "--dtype", "float32") as (server, _):
        server.send_signal(signal.SIGINT)
        assert server.wait(40) == 0
    assert "Traceback" not in "".join(server.log)


@pytest.mark.slow
def test_a_hangup_loads_the_model_again(tiny_layerwise_path, tmp_path):
    """A model that cannot be loaded changes nothing."""
    model = tmp_path / "model"
    shutil.copytree(tiny_layerwise_path, model)
    body = {"query": "lift", "documents": ["air flows", "a wing"]}
    with process(model, "--dtype", "float32") as (server, address), httpx.Client(base_url=address) as client:

        def hang_up(result):
            server.send_signal(signal.SIGHUP)
            wait_for(client, f'matryoshka_reloads_total{{result="{result}"}} 1.0')
            return client.get("/ready").json()["fingerprint"], client.post("/rerank", json=body).json()["results"]

        first = client.get("/ready").json()["fingerprint"], client.post("/rerank", json=body).json()["results"]
        weights = model / "model.safetensors"
        kept = weights.read_bytes()
        weights.unlink()
        assert hang_up("failed") == first
        changed = load(kept)
        changed["model.norm.weight"] = -changed["model.norm.weight"]
        save_file(changed, weights, {"format": "pt"})
        fingerprint, results = hang_up("loaded")
        assert fingerprint != first[0] and results != first[1]
    assert "cannot be loaded again, and stays as it was" in "".join(server.log)
    assert "Traceback" not in "".join(server.log)


@pytest.mark.slow
def test_defaults_of_the_command_line_are_the_rerankers(tiny_layerwise_path):
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
        {"index": hit["corpus_id"], "score": pytest.approx(hit["score"], abs=1e-5)}
        | ({"is_truncated": True} if "is_truncated" in hit else {})
        for hit in scores
    ]


@pytest.mark.slow
def test_every_line_of_a_json_log_is_json(tmp_path):
    """Also those about loading, an assumed template among them, which is said once."""
    path = write_causal_lm(tmp_path / "mine")
    with process(path, "--dtype", "float32", "--log_format", "json") as (server, address):
        assert httpx.post(f"{address}/rerank", json={"query": "q", "texts": ["t"]}).status_code == 200
        server.send_signal(signal.SIGTERM)
        server.wait(40)
    records = [json.loads(line) for line in server.log]
    assumed = [record for record in records if "'cost_wise' is assumed" in record["message"]]
    assert [record["levelname"] for record in assumed] == ["WARNING"]
    (ready,) = [record["message"] for record in records if " is ready " in record["message"]]
    assert re.search(r"mine is ready on cpu in float32, exits \[.*\], template cost_wise", ready)
    assert [record["path"] for record in records if "path" in record] == ["/rerank"]
