import json
from importlib.util import find_spec

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.adapters import adapter_file
from flagembedding_matryoshka.inference.engine import Engine
from tests.finetune.runs import runner, scores_of
from tests.tiny_base import TINY_BASE

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]


@pytest.fixture(scope="module")
def stage1(training_file, tmp_path_factory):
    """Adapters that change scores by more than the quantization to four bits does."""
    path = tmp_path_factory.mktemp("four_bits") / "stage1"
    runner(TINY_BASE, training_file, path, {"start_layer": 2}, max_steps=4, learning_rate=1e-2).run()
    return path


def in_four_bits(start, stage1, training_file, output_dir, **training):
    """A run on top of adapters, which are the model, or are merged first."""
    model, model_args = (stage1, {}) if start == "directory" else (TINY_BASE, {"start_layer": 2})
    if start == "raw_peft":
        model_args["raw_peft"] = [str(stage1)]
    return runner(model, training_file, output_dir, {"load_in_4bit": True, **model_args}, **training)


def scores_in_memory(run, reranker):
    reranker._engine = Engine(run.model.model.get_base_model().eval())
    return scores_of(reranker)


@pytest.mark.parametrize("start", ["directory", "raw_peft"])
def test_adapters_are_merged_before_weights_are_rounded(start, stage1, training_file, tmp_path):
    base, merged, small = (
        scores_of(MatryoshkaReranker(str(path), dtype="float32", devices="cpu", **options))
        for path, options in ((TINY_BASE, {"start_layer": 2}), (stage1, {}), (stage1, {"quantization": "nf4"}))
    )
    run = in_four_bits(start, stage1, training_file, tmp_path / "out")
    found = scores_in_memory(run, MatryoshkaReranker(str(stage1), dtype="float32", devices="cpu"))
    torch.testing.assert_close(found, small, atol=1e-6, rtol=0)
    assert 0 < (found - merged).abs().mean() < 0.2 * (base - merged).abs().mean()


def test_adapters_are_looked_for_with_the_options_of_the_hub_alone(stage1, training_file, tmp_path, monkeypatch):
    calls = []

    def recorded(adapter, **options):
        calls.append((str(adapter), options))
        return adapter_file(adapter, **options)

    monkeypatch.setattr("flagembedding_matryoshka.checkpoints.adapters.adapter_file", recorded)
    model_args = {"load_in_4bit": True, "raw_peft": [str(stage1)], "from_peft": str(stage1)}
    model_args |= {"start_layer": 2, "cache_dir": str(tmp_path / "hub"), "save_merged_lora_model": True}
    output_dir = tmp_path / "out"
    runner(TINY_BASE, training_file, output_dir, model_args, max_steps=1).run()
    hub = {"cache_dir": str(tmp_path / "hub")}
    assert calls == [(str(stage1), hub)] * 3 + [(str(output_dir), hub)]  # merged, learning; merged and what was learnt


@pytest.mark.slow
@pytest.mark.parametrize("start", ["directory", "raw_peft"])
def test_what_learns_over_merged_adapters_in_four_bits_is_found_again(start, stage1, training_file, tmp_path):
    output_dir = tmp_path / "out"
    run = in_four_bits(
        start,
        stage1,
        training_file,
        output_dir,
        max_steps=20,
        logging_steps=1,
        learning_rate=2e-3,
        gradient_checkpointing=True,
        compress_layers=[2],
        compress_ratios=[1, 2],
    )
    before = scores_in_memory(run, MatryoshkaReranker(str(stage1), dtype="float32", devices="cpu"))
    run.run()
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    noted = json.loads((output_dir / "config.json").read_text())
    assert noted["raw_peft"] == [str(stage1)] and "quantization_config" not in noted
    assert json.loads((output_dir / "adapter_config.json").read_text())["base_model_name_or_path"] == TINY_BASE
    loaded = MatryoshkaReranker(str(output_dir), dtype="float32", devices="cpu")
    written = scores_of(loaded)
    trained = scores_in_memory(run, loaded)
    # The base of the loaded model has full precision; in training it had four bits.
    assert (written - trained).abs().mean() < 0.3 * (trained - before).abs().mean()
