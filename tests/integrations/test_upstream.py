"""sentence-transformers' own tests of CrossEncoder, run on ours: `make test-upstream SENTENCE_TRANSFORMERS=DIR`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = os.environ.get("SENTENCE_TRANSFORMERS")
FILES = ["test_model.py", "test_multi_process.py"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SOURCES, reason="needs SENTENCE_TRANSFORMERS=DIR, a checkout of sentence-transformers")
def test_their_tests_of_a_cross_encoder_pass(tiny_layerwise_path):
    environment = os.environ | {
        "MATRYOSHKA_MODEL": str(tiny_layerwise_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])]),
        "HF_HUB_OFFLINE": "1",
    }
    files = [f"tests/cross_encoder/{name}" for name in FILES]
    options = ["-p", "upstream_plugin", "-p", "no:cacheprovider", "-o", "addopts=", "-rfE", "-q"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=SOURCES, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 20
