import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.finetune.callbacks import SavedSteps
from tests.finetune.runs import close, command_line, run_command, runner, scores_of

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "average_last": 3,
}


def weights(directory):
    name = "adapter_model.safetensors" if (directory / "adapter_config.json").exists() else "model.safetensors"
    return load_file(directory / name)


def mean_of(output_dir, *steps):
    states = [weights(output_dir / f"checkpoint-{step}") for step in steps]
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def are_close(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_args", [{"use_lora": False}, {"modules_to_save": ["lm_head.4"]}], ids=["all weights", "heads"]
)
def test_the_mean_of_the_last_checkpoints_is_written(model_args, tiny_raw_model_path, training_file, tmp_path):
    if "modules_to_save" in model_args:
        model_args = model_args | {"target_modules": ["q_proj"]}
    output_dir = tmp_path / "out"
    runner(tiny_raw_model_path, training_file, output_dir, {"start_layer": 2} | model_args, **OPTIONS).run()
    are_close(weights(output_dir), mean_of(output_dir, 3, 4, 5))
    last = weights(output_dir / "checkpoint-5")
    changed = [name for name, weight in weights(output_dir).items() if (weight - last[name]).abs().max() > 1e-4]
    assert any("lm_head" in name for name in changed) or "modules_to_save" not in model_args
    assert len(changed) > len(last) / 2


def test_scores_are_those_of_averaged_adapters(tiny_raw_model_path, training_file, tmp_path):
    output_dir = tmp_path / "out"
    options = OPTIONS | {"save_steps": 2, "average_last": 2, "save_total_limit": 2}
    runner(tiny_raw_model_path, training_file, output_dir, {"start_layer": 2}, **options).run()
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    are_close(weights(output_dir), mean_of(output_dir, 4, 5))
    by_hand = tmp_path / "by_hand"
    shutil.copytree(output_dir / "checkpoint-5", by_hand)
    rerankers = {"last": MatryoshkaReranker(str(by_hand), dtype="float32", devices="cpu")}
    save_file(mean_of(output_dir, 4, 5), by_hand / "adapter_model.safetensors", {"format": "pt"})
    rerankers["mean"] = MatryoshkaReranker(str(by_hand), dtype="float32", devices="cpu")
    found = scores_of(MatryoshkaReranker(str(output_dir), dtype="float32", devices="cpu"))
    close(found, scores_of(rerankers["mean"]))
    assert (found - scores_of(rerankers["last"])).abs().max() > 1e-3


@pytest.mark.slow
def test_a_run_that_is_resumed_averages_the_same(tiny_raw_model_path, training_file, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = (tiny_raw_model_path, training_file)
    runner(*arguments, whole, {"start_layer": 2}, **OPTIONS).run()
    for max_steps, average_last in ((4, 1), (5, 3), (5, 3)):  # the last one has nothing left to train
        options = OPTIONS | {"max_steps": max_steps, "average_last": average_last, "save_total_limit": 3}
        runner(*arguments, resumed, {"start_layer": 2}, **options, resume_from_checkpoint="last").run()
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_write_the_mean_of_epochs(tiny_raw_model_path, training_file, tmp_path):
    options = ("--per_device_train_batch_size", "2", "--save_strategy", "epoch", "--average_last", "3")
    run_command(command_line(tiny_raw_model_path, training_file, tmp_path / "out", 2, *options))
    are_close(weights(tmp_path / "out"), mean_of(tmp_path / "out", 8, 10, 12))


@pytest.mark.slow
def test_the_mean_is_evaluated(tiny_raw_model_path, training_file, tmp_path):
    options = OPTIONS | {"save_total_limit": 4}
    arguments = (tiny_raw_model_path, training_file, tmp_path / "out", {"start_layer": 2})
    run = runner(*arguments, {"eval_data": [str(training_file)]}, **options)
    run.run()
    assert "average_nDCG@10" in run.trainer.state.log_history[-1]
    with pytest.raises(ValueError, match=r"average_last=3, but save_total_limit=3 .* at least 4, the last 3 and the"):
        runner(*arguments, {"eval_data": [str(training_file)]}, **options | {"save_total_limit": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_last": 0}, "average_last=0, but must be at least 1"),
        ({"save_strategy": "no"}, "average_last=3 needs save_strategy steps or epoch, got no"),
        ({"save_total_limit": 2}, "average_last=3, but save_total_limit=2 .* keep at least 3, the last 3"),
        ({"load_best_model_at_end": True}, "average_last=3 contradicts load_best_model_at_end=True"),
    ],
)
def test_arguments_that_contradict_an_average_are_refused(
    options, message, tiny_raw_model_path, training_file, tmp_path
):
    data_args = {"eval_data": [str(training_file)]} if "load_best_model_at_end" in options else {}
    with pytest.raises(ValueError, match=message):
        runner(tiny_raw_model_path, training_file, tmp_path / "out", {}, data_args, **OPTIONS | options)


def begin(output_dir, steps=(), **options):
    given = {"output_dir": output_dir, "average_last": 3, "save_strategy": "steps", "save_total_limit": None}
    given |= {"gradient_accumulation_steps": 2} | options
    state = TrainerState(global_step=max(steps, default=0), max_steps=10, save_steps=4)
    saved = SavedSteps()
    saved.steps = list(steps[:-1])
    state.stateful_callbacks = {"SavedSteps": saved.state()}
    again = SavedSteps()
    again.on_train_begin(SimpleNamespace(**given), state, None, train_dataloader=range(9))
    return again


def write_checkpoint(output_dir, step):
    (output_dir / f"checkpoint-{step}").mkdir()
    (output_dir / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step": 1}')


def test_too_few_checkpoints_are_refused_before_training(tmp_path):
    begin(tmp_path)
    with pytest.raises(ValueError, match=r"average_last=4, but the run of 10 steps has 3 check.* 4, 8, 10: train"):
        begin(tmp_path, average_last=4)
    with pytest.raises(ValueError, match="has 2 checkpoints, of steps 5, 10"):
        begin(tmp_path, save_strategy="epoch")
    begin(tmp_path, average_last=1, save_strategy="no")
    with pytest.raises(ValueError, match="has 2 checkpoints, of steps 8, 10"):
        begin(tmp_path, [4])  # which is not there any more
    write_checkpoint(tmp_path, 4)
    saved = begin(tmp_path, [4])
    assert saved.steps == [4]
    write_checkpoint(tmp_path, 12)
    with pytest.raises(ValueError, match=r"has checkpoints of another run, .* steps 12\. Remove"):
        begin(tmp_path, [4], save_total_limit=3)
    for step in (8, 10):
        saved.on_save(None, TrainerState(global_step=step), None)
    args = SimpleNamespace(output_dir=tmp_path, average_last=3)
    with pytest.raises(ValueError, match=r"needs 2 checkpoints before that of step 10, but .* has 1 complete ones"):
        saved.checkpoints(args, 10)
    write_checkpoint(tmp_path, 8)
    assert [path.name for path in saved.checkpoints(args, 10)] == ["checkpoint-8", "checkpoint-4"]


def test_a_missing_checkpoint_is_refused_before_training(tmp_path):
    for step in (4, 9):
        write_checkpoint(tmp_path, step)
    with pytest.raises(ValueError, match=r"needs the checkpoints of steps 8, 9, 10, but .* no complete checkpoint-8:"):
        begin(tmp_path, [4, 8, 9])
    begin(tmp_path, [4, 8, 9], average_last=2)
    write_checkpoint(tmp_path, 8)
    begin(tmp_path, [4, 8, 9])
