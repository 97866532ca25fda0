from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from flagembedding_matryoshka.finetune.callbacks import DataOrder
from flagembedding_matryoshka.finetune.trainer import MatryoshkaTrainer
from tests.finetune.runs import runner

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 1,
    "lr_scheduler_type": "constant",
    "compress_layers": [2, 4],
    "compress_ratios": [1, 2, 4],
    "per_device_train_batch_size": 2,
}


class Killed(Exception):
    pass


@pytest.fixture
def passes(monkeypatch):
    """(step, token ids, loss) of every pass; a pass of the step in `passes.killed_at` ends the run."""

    class Passes(list):
        killed_at = None

    seen, compute_loss = Passes(), MatryoshkaTrainer.compute_loss

    def recorded(self, model, inputs, *args, **kwargs):
        if self.state.global_step == seen.killed_at:
            raise Killed
        tokens = inputs["pair"].token_ids.tolist()
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        seen.append((self.state.global_step, tokens, float(loss)))
        return loss

    monkeypatch.setattr(MatryoshkaTrainer, "compute_loss", recorded)
    return seen


@pytest.fixture
def nine_rows(training_file, tmp_path):
    """Five batches of two rows an epoch, the last with one."""
    path = tmp_path / "nine.jsonl"
    text = training_file.read_text()
    path.write_text(text + text.splitlines(keepends=True)[0])
    return path


WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}


@pytest.mark.parametrize(
    ("options", "evaluates"),
    [
        pytest.param({}, False, marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation_steps": 2}, False, marks=pytest.mark.slow),
        pytest.param(WORKERS, True, marks=pytest.mark.slow),
        pytest.param({**WORKERS, "gradient_accumulation_steps": 2}, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_twice_trains_like_an_uninterrupted_run(
    options, evaluates, tiny_raw_model_path, nine_rows, tmp_path, passes
):
    def run(output_dir, **more):
        model_args = {"start_layer": 2, "lora_dropout": 0.2}
        data_args = {"random_negatives": 0.4} | ({"eval_data": [str(nine_rows)]} if evaluates else {})
        arguments = (tiny_raw_model_path, nine_rows, tmp_path / output_dir, model_args, data_args)
        runner(*arguments, **OPTIONS | options, **more).run()
        return load_file(tmp_path / output_dir / "adapter_model.safetensors")

    expected = run("whole")
    whole = list(passes)
    assert {step for step, *_ in whole} == set(range(7))
    # The third step is the last of an epoch where passes are accumulated; the sixth lies within the second one.
    for start, killed_at in ((0, 4), (3, 6)):
        passes.clear()
        passes.killed_at = killed_at
        with pytest.raises(Killed):
            run("killed", resume_from_checkpoint="last")
        assert passes == [each for each in whole if start <= each[0] < killed_at]
        if killed_at == 4:
            (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    passes.clear()
    passes.killed_at = None
    resumed = run("killed", resume_from_checkpoint="last")
    assert passes == [each for each in whole if each[0] == 6]
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    passes.clear()
    finished = run("killed", resume_from_checkpoint="last")
    assert not passes
    assert all(torch.equal(finished[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_run_is_not_resumed_in_another_order(tiny_raw_model_path, nine_rows, tmp_path, passes):
    def run(**more):
        options = OPTIONS | {"max_steps": 4, "save_steps": 3} | more
        runner(tiny_raw_model_path, nine_rows, tmp_path / "out", {"start_layer": 2}, **options).run()

    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    run()
    count = len(passes)
    with pytest.raises(ValueError, match=r"step 3 .* processes\): 2 before, 4 now; steps per epoch: 5 before, 3 now"):
        run(resume_from_checkpoint=checkpoint, per_device_train_batch_size=4)
    assert len(passes) == count
    run(resume_from_checkpoint=checkpoint, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert [step for step, *_ in passes[count:]] == [3, 3]


def test_changes_of_the_order_are_named():
    class Loader(list):
        dataset = range(9)

    def begin(state, batches=5, **args):
        order = DataOrder()
        given = {
            "gradient_accumulation_steps": 1,
            "train_batch_size": 2,
            "world_size": 1,
            "seed": 42,
            "data_seed": None,
        }
        order.on_train_begin(SimpleNamespace(**given | args), state, None, train_dataloader=Loader(range(batches)))
        return TrainerState(global_step=3, stateful_callbacks=[order])

    saved = begin(TrainerState())
    begin(saved)
    begin(saved, world_size=2, train_batch_size=1)
    begin(TrainerState(global_step=3), seed=7)  # written by a version that did not note the order
    for changed, message in (
        ({"seed": 7}, r"order of rows\. seed: 42 before, 7 now\. Resume"),
        ({"data_seed": 7}, r"order of rows\. data_seed: None before, 7 now\. Resume"),
        ({"world_size": 2}, r"processes\): 2 before, 4 now\. Resume"),
        ({"batches": 4}, r"order of rows\. steps per epoch: 5 before, 4 now\. Resume"),
    ):
        with pytest.raises(ValueError, match=message):
            begin(saved, **changed)
