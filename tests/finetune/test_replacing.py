"""Fine-tuning replaces the files of an earlier run in its output_dir."""

import shutil

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from tests.finetune.runs import close, runner, scores_of
from tests.leftovers import OWN, files, leave

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("use_lora", [True, False])
def test_nothing_of_an_earlier_run_is_left(use_lora, tiny_raw_model_path, tiny_layerwise_path, training_file, tmp_path):
    used = leave(tmp_path / "used", tiny_layerwise_path, tiny_raw_model_path)
    shutil.copy(tiny_layerwise_path / "config.json", used)
    before = files(used)
    found = []
    for place in (tmp_path / "fresh", used):
        options = {"start_layer": 2, "use_lora": use_lora}
        run = runner(tiny_raw_model_path, training_file, place, options, save_strategy="steps", save_steps=1)
        if place == used:
            assert files(used) == before  # nothing goes before there is something to put in its place
        run.run()
        found.append(scores_of(MatryoshkaReranker(str(place), dtype="float32", devices="cpu")))
        with pytest.raises(FileNotFoundError, match="has no matryoshka_plan"):
            MatryoshkaReranker(str(place), devices="cpu", budget=1.0)
    close(found[0], found[1])
    steps = {name.split("/")[0] for name in files(used) if name.startswith("checkpoint-")}
    assert steps == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    written = {name for name in files(tmp_path / "fresh") if not name.startswith("checkpoint-")}
    own = set(OWN) - ({"README.md"} if use_lora else set())  # to which peft adds its part
    assert {name for name in files(used) if not name.startswith("checkpoint-")} | {OWN[3]} == written | set(OWN)
    assert all((used / name).read_text() in ("mine", "{}") for name in own)


def test_a_merged_model_is_replaced_as_a_whole(tiny_raw_model_path, tiny_layerwise_path, training_file, tmp_path):
    used = leave(tmp_path / "used", tiny_layerwise_path, tiny_raw_model_path)
    leave(used / "merged_model", tiny_layerwise_path, tiny_raw_model_path)
    options = {"start_layer": 2, "save_merged_lora_model": True}
    runner(tiny_raw_model_path, training_file, used, options).run()
    adapted, merged = (
        MatryoshkaReranker(str(path), dtype="float32", devices="cpu") for path in (used, used / "merged_model")
    )
    close(scores_of(merged), scores_of(adapted))
    assert not files(used / "merged_model") & {"adapter_config.json", "matryoshka_plan.json", "matryoshka_config.json"}


@pytest.mark.slow
def test_a_resumed_run_keeps_its_checkpoints_and_replaces_what_the_first_wrote(
    tiny_raw_model_path, training_file, tmp_path
):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    arguments = (tiny_raw_model_path, training_file, tmp_path / "out", {"start_layer": 2})
    runner(*arguments, **options).run()
    (tmp_path / "out" / "matryoshka_plan.json").write_text("{}")
    before = files(tmp_path / "out")
    runner(*arguments, **options | {"max_steps": 3}, resume_from_checkpoint="last").run()
    assert before - files(tmp_path / "out") == {"matryoshka_plan.json"}
    assert (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").exists()


@pytest.mark.parametrize("place", ["", "merged_model"])
def test_adapters_do_not_replace_what_they_are_loaded_with(place, tiny_raw_model_path, training_file, tmp_path):
    base = shutil.copytree(tiny_raw_model_path, tmp_path / "out" / place)
    with pytest.raises(ValueError, match=r"output_dir=.*out would replace .*, which the new adapters are"):
        runner(base, training_file, tmp_path / "out", {"start_layer": 2})
    first = tmp_path / "first"
    runner(tiny_raw_model_path, training_file, first, {"start_layer": 2}).run()
    for model, more in ((first, {}), (tiny_raw_model_path, {"start_layer": 2, "raw_peft": [str(first)]})):
        with pytest.raises(ValueError, match=r"output_dir=.*first would replace .*first"):
            runner(model, training_file, first, more)


def test_all_weights_may_replace_those_that_they_began_as(tiny_layerwise_path, training_file, tmp_path):
    model = shutil.copytree(tiny_layerwise_path, tmp_path / "model")
    before = scores_of(MatryoshkaReranker(str(model), dtype="float32", devices="cpu"))
    runner(model, training_file, model, {"use_lora": False}, learning_rate=1e-2).run()
    assert not torch.allclose(scores_of(MatryoshkaReranker(str(model), dtype="float32", devices="cpu")), before)
