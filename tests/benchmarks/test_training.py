import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.training import jobs, padded
from benchmarks.training.learner import Learner
from benchmarks.training.measurements import measure_alone, measure_time
from benchmarks.training.report import describe
from benchmarks.training.shapes import big_configs, small_config, small_granite_config
from flagembedding_matryoshka import Setting

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def job(monkeypatch):
    """Passages of 1 to 20 tokens: groups that are short, and passages that are a single group."""
    monkeypatch.setattr(jobs, "PASSAGE_LENGTHS", (1, 20))
    return jobs.Job(small_config(4, 32), 2, 3, 2, "cpu", 1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("compress_layers", "ratio"), [([], 1), ([2], 2), ([1, 3], 4), ([1, 2, 3], 2), ([1, 2], 8)])
def test_sides_agree_in_loss_and_gradients(job, compress_layers, ratio, checkpointing):
    job = replace(job, checkpointing=checkpointing)
    setting = Setting.resolve(job.config, job.config.exit_layers, compress_layers, ratio)
    ours, baseline = (Learner(job, side) for side in ("ours", "baseline"))
    assert ours.learn(setting) == pytest.approx(baseline.learn(setting), rel=1e-5)
    assert list(ours.weights) == list(baseline.weights)
    for name, weight in ours.weights.items():
        assert weight.grad.any(), name
        expected = baseline.weights[name].grad
        assert (weight.grad - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flag_embeddings_own_step_agrees(job, checkpointing):
    job = replace(job, config=small_granite_config(4, 32), compared="FlagEmbedding", checkpointing=checkpointing)
    ours, baseline = (Learner(job, side) for side in ("ours", "baseline"))
    assert ours.learn(job.settings[0]) == pytest.approx(baseline.learn(job.settings[0]), rel=1e-5)
    assert list(ours.weights) == list(baseline.weights)
    for name, weight in ours.weights.items():
        assert weight.grad.any(), name
        expected = baseline.weights[name].grad
        assert (weight.grad - expected).norm() <= 1e-4 * expected.norm(), name


def test_nothing_is_timed_where_sides_disagree(job, monkeypatch):
    compress = padded.compress_padded

    def unweighted(hidden, mask, weights, *args):
        return compress(hidden, mask, torch.ones_like(weights), *args)

    monkeypatch.setattr(padded, "compress_padded", unweighted)
    assert any(setting.compress_ratio > 1 for setting in job.settings)
    with pytest.raises(RuntimeError, match="different numbers"):
        measure_time(job)


def test_ours_alone(job):
    result = measure_alone(replace(job, checkpointing=True))
    assert len(result["steps_s"]) == job.steps
    assert result["tokens_per_s"] * result["total_s"] == pytest.approx(job.steps * sum(describe(job)["lengths"]))
    assert all(result[name] > 0 for name in ("tokens_per_s", "tflops_per_s", "share_of_matrix_peak", "peak_mib"))


@pytest.mark.parametrize("name", big_configs())
def test_the_shapes_of_a_gpu_can_be_learnt(job, name):
    config = big_configs()[name]
    config.num_hidden_layers, config.start_layer, config.vocab_size = 2, 1, 100
    config.hidden_size, config.intermediate_size = 64, 96
    job = replace(job, config=config, dtype=torch.bfloat16, checkpointing=True)
    assert measure_alone(job)["peak_mib"] > 0


@pytest.mark.slow
def test_script(tmp_path):
    options = ["--layers=4", "--hidden=64", "--group=2", "--steps=1", "--threads=1", "--device=cpu"]
    command = [sys.executable, "-m", "benchmarks.training", *options, "--output", tmp_path / "report.json"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    report = json.loads(output.splitlines()[-1])
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert len(report["settings"]) + 4 * len(report["skipped"]) == 8
    assert [setting["compared"] for setting in report["settings"][:3]] == ["research code"] * 2 + ["FlagEmbedding"]
    assert [setting["gradient_checkpointing"] for setting in report["settings"][:2]] == [False, True]
    for setting in report["settings"]:
        assert all(setting[side]["median_s"] > 0 for side in ("ours", "baseline"))
        assert setting["time_ratio"] > 0
        assert setting["memory_ratio"] > 0
    assert report["environment"]["threads"] == 1
