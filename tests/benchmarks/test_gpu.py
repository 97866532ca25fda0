import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
import torch

from benchmarks import gpu
from benchmarks.scoring.checkpoints import SHAPES
from tests.shipped import needs_base

ROOT = Path(__file__).parents[2]


@needs_base
@pytest.mark.slow
def test_a_dry_run_measures_what_a_card_would(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path), "--dry_run"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    report = json.loads(output.splitlines()[-1])
    assert report == json.loads((tmp_path / "gpu.json").read_text())
    (scoring,), (serving,) = report["scoring"], report["serving"]
    names = {row["setting"] for row in scoring["settings"]}
    assert names >= {"full depth", "half depth", "full depth, ratio 2", "shared query", "cascade to 10 of 100"}
    assert serving["pairs_per_s"] > 0 and serving["latency_ms"]["p95"] >= serving["latency_ms"]["median"] > 0
    assert serving["tokens_per_pair"] == pytest.approx(155, abs=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there")
def test_without_a_card_the_dry_run_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no CUDA device is available" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_a_card_measures_shapes_that_exist():
    assert {*gpu.CARD.scoring, *gpu.CARD.serving, *gpu.DRY.scoring, *gpu.DRY.serving} <= SHAPES.keys()
