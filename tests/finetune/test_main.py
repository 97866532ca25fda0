import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from flagembedding_matryoshka.finetune import MatryoshkaModelArguments, MatryoshkaTrainingArguments
from flagembedding_matryoshka.finetune.__main__ import build_parser
from flagembedding_matryoshka.finetune.arguments import describe_run

# The example of FlagEmbedding's guide for its layer-wise re-ranker, without --deepspeed, which needs that package.
FLAG_EMBEDDING = """
    --model_name_or_path BAAI/bge-reranker-v2-minicpm-layerwise --use_lora True --lora_rank 32 --lora_alpha 64
    --target_modules q_proj k_proj v_proj o_proj --save_merged_lora_model True --model_type from_finetuned_model
    --start_layer 8 --head_multi True --head_type simple --trust_remote_code True --cache_dir ./cache/model
    --train_data {data} --cache_path ./cache/data --train_group_size 8 --query_max_len 512 --passage_max_len 512
    --pad_to_multiple_of 8 --knowledge_distillation True --query_instruction_for_rerank 'A: '
    --query_instruction_format {{}}{{}} --passage_instruction_for_rerank 'B: ' --passage_instruction_format {{}}{{}}
    --output_dir {output} --learning_rate 2e-4 --num_train_epochs 1 --use_flash_attn True
    --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --dataloader_drop_last True --warmup_ratio 0.1
    --gradient_checkpointing --weight_decay 0.01 --logging_steps 1 --save_steps 1000 --overwrite_output_dir
"""


def test_flag_embeddings_layer_wise_command_line_is_understood(training_file, tmp_path):
    words = shlex.split(FLAG_EMBEDDING.format(data=training_file, output=tmp_path))
    model, data, training = build_parser().parse_args_into_dataclasses(words)
    assert (model.start_layer, model.head_multi, model.head_type) == (8, True, "simple")
    assert data.query_instruction_for_rerank == "A: "
    assert training.train_method == "distill_fix_layer_teacher"


@pytest.mark.parametrize(("has_gpu", "workers"), [(True, 2), (False, 0)])
def test_two_processes_load_data_for_a_gpu(has_gpu, workers, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: has_gpu)
    assert MatryoshkaTrainingArguments(str(tmp_path)).dataloader_num_workers == workers
    assert MatryoshkaTrainingArguments(str(tmp_path), use_cpu=True).dataloader_num_workers == 0
    assert MatryoshkaTrainingArguments(str(tmp_path), dataloader_num_workers=1).dataloader_num_workers == 1


def test_every_argument_of_ours_is_explained(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    for name in ("--distill_loss", "--finetune_type", "--eval_data", "--load_in_4bit", "--skip_bad_lines"):
        assert name in text


def test_a_method_that_does_not_exist_is_answered_with_those_that_do(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--train_method", "distil"])
    assert "distill_fix_layer_teacher" in capsys.readouterr().err


def test_resuming_needs_no_value(training_file, tmp_path):
    words = ["--model_name_or_path", "m", "--train_data", str(training_file), "--output_dir", str(tmp_path)]
    for more, expected in (
        ([], None),
        (["--resume_from_checkpoint"], "last"),
        (["--resume_from_checkpoint", "x"], "x"),
    ):
        training = build_parser().parse_args_into_dataclasses([*words, *more])[2]
        assert training.resume_from_checkpoint == expected


def test_arguments_come_from_a_file_and_the_command_line_replaces_them(training_file, tmp_path):
    config = tmp_path / "run.yaml"
    values = {
        "model_name_or_path": "m", "train_data": [str(training_file)], "output_dir": str(tmp_path), "exits": [2, 4],
        "learning_rate": 1e-3, "use_lora": False, "template": None, "max_steps": 7,
        "lr_scheduler_kwargs": {"num_cycles": 2},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    words = ["--max_steps", "3", "--config", str(config), "--exits", "6"]
    model, data, training = build_parser().parse_args_into_dataclasses(words)
    assert (model.use_lora, model.exits, model.template, data.train_data) == (False, [6], None, [str(training_file)])
    assert (training.learning_rate, training.max_steps) == (1e-3, 3)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}


def test_the_file_on_the_page_is_read(training_file, tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "training.md"
    (text,) = re.findall(r"`run\.yaml`.*?```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    shutil.copy(training_file, tmp_path / "train.jsonl")
    words = ["--config", "run.yaml", "--max_steps", "8"]
    model, data, training = build_parser().parse_args_into_dataclasses(words)
    assert (model.model_name_or_path, data.train_data, data.train_group_size) == ("smollm2", ["train.jsonl"], 3)
    assert (training.train_method, training.compress_layers, training.max_steps) == ("normal", [3, 6], 8)


def test_the_arguments_of_a_run_are_written_as_a_file_that_gives_the_same_arguments(training_file, tmp_path):
    words = ["--model_name_or_path", "m", "--train_data", str(training_file), "--output_dir", str(tmp_path)]
    words += ["--token", "hf_secret", "--exits", "2", "4", "--lora_options", '{"use_dora": true}']
    words += [
        "--warmup_ratio",
        "0.1",
        "--eval_strategy",
        "steps",
        "--lr_scheduler_kwargs",
        '{"num_cycles": 2}',
        "--gradient_checkpointing",
    ]
    words += ["--use_cpu", "--resume_from_checkpoint", "--compress_layers", "2", "--finetune_type", "token"]
    first = build_parser().parse_args_into_dataclasses(words)
    values = describe_run(*first)
    text = yaml.safe_dump(values)
    assert "hf_secret" not in text and "resume_from_checkpoint" not in values
    assert (values["train_method"], values["learning_rate"], values["compress_ratios"]) == ("normal", 2e-5, [2])
    assert values["lora_options"] == {"use_dora": True}
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    again = build_parser().parse_args_into_dataclasses(["--config", str(tmp_path / "run.yaml")])
    assert describe_run(*again) == values


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("{", "lora_options is not JSON"),
        ('["use_dora"]', "not among peft's options"),
        ('{"r": 8}', "lora_options: r is not among peft's options, or is an argument of its own"),
        ('{"use_dorra": true}', "lora_options: use_dorra is not among peft's options.*use_dora"),
    ],
)
def test_options_that_peft_does_not_have_are_named(options, fault):
    with pytest.raises(ValueError, match=fault):
        MatryoshkaModelArguments(model_name_or_path="m", lora_options=options)
    with pytest.raises(ValueError, match=r"continues an adapter with its own configuration, but .*lora_options"):
        MatryoshkaModelArguments(model_name_or_path="m", from_peft="a", lora_options='{"use_dora": true}')
