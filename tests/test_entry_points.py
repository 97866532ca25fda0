from importlib.metadata import entry_points

import pytest

import flagembedding_matryoshka
from flagembedding_matryoshka.finetune import __main__ as finetune_main
from flagembedding_matryoshka.models.backbones import BACKBONES

EXPECTED = {
    **{("flagembedding.reranker.model", model.config_class.model_type): model.__name__ for model in BACKBONES},
    ("flagembedding.reranker.arguments", "matryoshka"): "MatryoshkaModelArguments",
    ("flagembedding.reranker.arguments", "matryoshka_data"): "MatryoshkaDataArguments",
    ("flagembedding.reranker.arguments", "matryoshka_training"): "MatryoshkaTrainingArguments",
    ("flagembedding.reranker.trainer", "matryoshka"): "MatryoshkaTrainer",
    ("flagembedding.reranker.runner", "matryoshka"): "MatryoshkaRunner",
    ("flagembedding.reranker.inference", "matryoshka"): "MatryoshkaReranker",
}


def load(group, name):
    (entry,) = entry_points(group=group, name=name)
    return entry.load()


def test_no_model_is_left_out():
    assert len(entry_points(group="flagembedding.reranker.model")) == len(BACKBONES)


@pytest.mark.parametrize(("group", "name"), EXPECTED)
def test_every_part_is_found_by_name(group, name):
    assert load(group, name).__name__ == EXPECTED[group, name]


def test_console_script_is_the_module():
    assert load("console_scripts", "flagembedding-matryoshka-finetune") is finetune_main.main


def test_a_run_put_together_from_what_the_names_load(tiny_raw_model_path, training_file, tmp_path):
    output_dir = tmp_path / "run"
    arguments = "flagembedding.reranker.arguments"
    runner = load("flagembedding.reranker.runner", "matryoshka")(
        model_args=load(arguments, "matryoshka")(model_name_or_path=str(tiny_raw_model_path), start_layer=2),
        data_args=load(arguments, "matryoshka_data")(train_data=[str(training_file)], train_group_size=2),
        training_args=load(arguments, "matryoshka_training")(
            output_dir=str(output_dir),
            max_steps=1,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
        ),
    )
    assert isinstance(runner.trainer, load("flagembedding.reranker.trainer", "matryoshka"))
    runner.run()
    scores = load("flagembedding.reranker.inference", "matryoshka")(str(output_dir)).compute_score([("a", "b")])
    assert len(scores) == 1


def test_the_package_exports_its_re_ranker():
    assert flagembedding_matryoshka.MatryoshkaReranker is load("flagembedding.reranker.inference", "matryoshka")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = flagembedding_matryoshka.Nothing
