import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shipped import needs_base

ROOT = Path(__file__).parents[2]


@needs_base
@pytest.mark.slow
def test_every_number_of_tokens_is_measured(tmp_path):
    options = ["--shapes", "4x128", "--dtypes", "float32", "--tokens", "200", "400", "--pairs", "8", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.batch_tokens", *options, "--output", str(tmp_path / "found.json")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    report = json.loads(output.splitlines()[-1])
    assert report == json.loads((tmp_path / "found.json").read_text())
    assert [result["ratio"] for result in report["results"]] == [1, 4]
    for result in report["results"]:
        speeds = {int(tokens): speed for tokens, speed in result["pairs_per_s"].items()}
        assert sorted(speeds) == [200, 400, result["own"]]
        assert result["lost"] == pytest.approx(max(speeds.values()) / speeds[result["own"]] - 1)
