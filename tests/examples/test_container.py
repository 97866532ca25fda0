"""The files of examples/container. The Dockerfile's steps run as a script, because docker need not be at hand."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest
import yaml

from flagembedding_matryoshka.serve import create_app
from flagembedding_matryoshka.serve.__main__ import build_parser
from flagembedding_matryoshka.serve.metrics import Metrics
from tests.shipped import needs_smollm2

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "container"


def steps():
    """(instruction, its text) of each line of the Dockerfile."""
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


def text_of(instruction):
    (text,) = (text for name, text in steps() if name == instruction)
    return text


def server_words():
    words = [*json.loads(text_of("ENTRYPOINT")), *json.loads(text_of("CMD"))]
    assert words[:2] == ["flagembedding-matryoshka", "serve"]
    return words


@pytest.fixture
def image(tmp_path):
    """A directory in place of /server, with an environment of its own that finds the packages of this one."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": venv, "platbase": venv}))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = venv / "bin" / "pip"
    pip.write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    pip.chmod(0o755)
    yield tmp_path
    subprocess.run(["chmod", "-R", "u+w", tmp_path], check=True)  # pytest removes it later


def built(image):
    """Run the steps of the build. Return the environment of a container."""
    server = image / "server"
    server.mkdir()
    environment = {"PATH": f"{image / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}", "TORCH_FLAGS": ""}
    # Nothing is fetched: pip finds the packages of the outer environment, and builds with its setuptools.
    of_build = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for name, text in steps():
        text = text.replace("/server", str(server))
        if name == "ENV":
            environment |= dict(word.split("=", 1) for word in shlex.split(text))
        elif name == "COPY":
            *sources, target = text.split()
            for source in sources:
                place = server / target
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)
        elif name == "RUN":
            done = subprocess.run(
                text, shell=True, cwd=server, env=environment | of_build, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return environment


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@needs_smollm2
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_steps_make_a_server_that_needs_no_privilege_and_writes_nothing(image):
    environment = built(image)
    subprocess.run(["chmod", "-R", "a-w", image], check=True)
    port = str(free_port())
    check = re.search(r"CMD (.*)", text_of("HEALTHCHECK"))[1].replace("8000", port)
    # Without capabilities root obeys the modes of files, too. Another user might not reach this interpreter.
    dropped = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    words = [*dropped, *server_words(), "--devices", "cpu", "--port", port]
    before = sorted(image.rglob("*"))
    with subprocess.Popen(
        words, cwd=image / "server", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:
        while subprocess.run(check, shell=True, env=environment, capture_output=True).returncode != 0:
            assert server.poll() is None, server.stdout.read()
            time.sleep(1)
        body = {"query": "how to sort a list", "documents": ["Open a file.", "Sort the items of the list in place."]}
        answer = httpx.post(f"http://127.0.0.1:{port}/rerank", json=body, timeout=60)
        assert [result["index"] for result in answer.json()["results"]] == [1, 0]
        server.send_signal(signal.SIGTERM)
        printed = server.communicate()[0].decode()
    assert server.returncode in (0, -signal.SIGTERM)  # uvicorn raises the signal again after its shutdown
    assert "Traceback" not in printed and "cannot be written" not in printed
    assert sorted(image.rglob("*")) == before


def test_the_dockerfile_names_files_and_options_that_exist():
    assert all((ROOT / word).exists() for name, text in steps() if name == "COPY" for word in text.split()[:-1])
    options = build_parser().parse_args(server_words()[2:])
    assert (options.model, options.host, str(options.port)) == ("smollm2", "0.0.0.0", text_of("EXPOSE"))
    user, group = text_of("USER").split(":")
    assert int(user) > 0 and int(group) > 0 and f":{options.port}/ready" in text_of("HEALTHCHECK")


def test_the_compose_file_builds_the_dockerfile_with_a_read_only_root():
    (service,) = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"].values()
    build = service["build"]
    context = (FOLDER / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]).is_file()
    assert build["args"].keys() == {text.partition("=")[0] for name, text in steps() if name == "ARG"}
    assert service["read_only"] and service["tmpfs"] == ["/tmp"] and service["cap_drop"] == ["ALL"]
    seconds = build_parser().parse_args(["--model", "m"]).shutdown_seconds
    assert int(service["stop_grace_period"].removesuffix("s")) > seconds


def test_kubernetes_probes_paths_and_scales_by_a_metric_of_the_server():
    deployment, service, scaler = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    paths = {route.path for route in create_app(Future(), "not loaded").routes}
    probes = [container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert probes == ["/ready", "/ready", "/live"] and {*probes, "/metrics"} <= paths
    assert container["securityContext"]["readOnlyRootFilesystem"] and pod["spec"]["securityContext"]["runAsNonRoot"]
    build_parser().parse_args(container["args"])
    assert service["spec"]["selector"] == pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (metric,) = (one["pods"]["metric"]["name"] for one in scaler["spec"]["metrics"])
    assert f"\n{metric} " in Metrics(lambda: 0, 1, lambda: 0, 1).text().decode()
