import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks.scoring import agreement
from benchmarks.scoring.checkpoints import config_of, write_checkpoint
from benchmarks.scoring.plain import PlainCrossEncoder
from benchmarks.scoring.settings import settings_of
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.gguf import SMOLLM2_BASE_NAME
from flagembedding_matryoshka.checkpoints.loading import load_tokenizer
from tests.shipped import needs_base, needs_smollm2

ROOT = Path(__file__).parents[2]


@needs_smollm2
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_setting_is_measured(tmp_path):
    options = ["--shapes", "4x128", "--pairs", "6", "--rounds", "1", "--queries", "0", "--device", "cpu"]
    files = ["--output", str(tmp_path / "scoring.json"), "--figure", str(tmp_path / "scoring.png")]
    command = [sys.executable, "-m", "benchmarks.scoring", *options, *files]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    report = json.loads(output.splitlines()[-1])
    assert report == json.loads((tmp_path / "scoring.json").read_text())
    assert (tmp_path / "scoring.png").read_bytes()[:4] == b"\x89PNG"
    assert report["shapes"][0]["seconds_to_first_score"] > 0
    assert 0 < report["shapes"][0]["tokenizing_share"] < 1
    rows = {row["setting"]: row for row in report["shapes"][0]["settings"]}
    assert all(row["pairs_per_s"] > 0 and row["speedup"] > 0 for row in rows.values())
    assert rows["full depth"]["flops_share"] == rows["full depth"]["time_share"] == 1
    part = 32_768 / 221_184  # of a layer, that gives keys and values alone
    assert rows["half depth"]["flops_share"] == pytest.approx((1 + part) / (3 + part), abs=0.01)
    assert rows["full depth, int8"]["correlation_with_full_depth"] > 0.9


@needs_smollm2
@pytest.mark.slow
def test_less_than_all_work_keeps_a_part_of_the_full_ranking(monkeypatch):
    # The standard library's alone: all docstrings of the environment take more than a minute.
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))
    monkeypatch.setattr(agreement, "collect_pairs", partial(agreement.collect_pairs, files))
    monkeypatch.setattr(agreement, "quantizations", lambda _: ["int8"])
    monkeypatch.setattr(agreement, "TOP", 2)
    full, int8, *cascades = agreement.agreement(2, 20)
    assert (full["setting"], int8["setting"]) == ("full depth", "int8") and full["queries"] == 2
    assert full["overlap_of_top_10"] == 1 and int8["overlap_of_top_10"] >= 0.75
    assert len(cascades) == 3 and cascades[0]["overlap_of_top_10"] >= cascades[-1]["overlap_of_top_10"]


@needs_base
def test_nothing_is_timed_where_the_scores_disagree(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(SMOLLM2_BASE_NAME)
    write_checkpoint(config_of("4x128", len(tokenizer)), tokenizer, str(tmp_path))
    ours = MatryoshkaReranker(str(tmp_path), devices="cpu", dtype="float32")
    monkeypatch.setattr(PlainCrossEncoder, "compute_score", lambda *_: [0.0])
    with pytest.raises(RuntimeError, match="differ by up to"):
        settings_of(ours, [("wing", "a wing")], {})
