import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
from benchmarks import serving
from tests.shipped import needs_smollm2


@needs_smollm2
@pytest.mark.slow
def test_both_servers_are_measured(tmp_path):
    options = ["--clients", "3", "--requests", "2", "--rounds", "1", "--output", str(tmp_path / "serving.json")]
    command = [sys.executable, "-m", "benchmarks.serving", *options]
    root = Path(serving.__file__).parents[1]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    report = json.loads(output.splitlines()[-1])
    assert report == json.loads((tmp_path / "serving.json").read_text())
    assert [row["setting"] for row in report["settings"]] == list(serving.SETTINGS)
    assert all(row["requests_per_s"] > 0 for row in report["settings"])
