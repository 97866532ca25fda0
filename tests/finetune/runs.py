"""Helpers: short trainings of tiny models, and the scores of their checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from flagembedding_matryoshka.finetune import (
    MatryoshkaDataArguments,
    MatryoshkaModelArguments,
    MatryoshkaRunner,
    MatryoshkaTrainingArguments,
)

PAIRS = [("what about the wing", "this text is about a wing"), ("what about the flow", "air")]
WIDTHS = [{}, {"compress_layers": [2], "compress_ratio": 2}]


def runner(model, data, output_dir, model_args=(), data_args=(), **training):
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "train_method": "normal",
        "save_strategy": "no",
    }
    adapter = {} if "from_peft" in dict(model_args) else {"lora_rank": 4, "lora_dropout": 0.0}
    return MatryoshkaRunner(
        model_args=MatryoshkaModelArguments(model_name_or_path=str(model), **(adapter | dict(model_args))),
        data_args=MatryoshkaDataArguments(
            train_data=[str(data)],
            train_group_size=4,
            query_max_len=64,
            passage_max_len=192,
            cache_path=str(Path(output_dir).parent / "cache"),
            **dict(data_args),
        ),
        training_args=MatryoshkaTrainingArguments(
            output_dir=str(output_dir),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **(options | training),
        ),
    )


def scores_of(reranker, **width):
    return torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=reranker.config.exit_layers, **width))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


LORA = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj", "gate_proj", "linear_head")


def command_line(model, data, output_dir, processes, *more):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"),
        *("-m", "flagembedding_matryoshka.finetune", "--model_name_or_path", str(model), "--train_data", str(data)),
        *("--output_dir", str(output_dir), "--cache_path", str(output_dir.parent / "cache"), "--start_layer", "2"),
        *("--layer_sep", "1", "--layer_wise", "True", "--train_method", "distill_fix_layer_teacher"),
        *("--knowledge_distillation", "True", "--use_lora", "True", "--lora_rank", "4", "--lora_alpha", "8"),
        *("--target_modules", *LORA, "--loss_type", "only logits", "--use_flash_attn", "False"),
        *("--padding_side", "right", "--train_group_size", "4", "--query_max_len", "64", "--passage_max_len", "192"),
        *("--learning_rate", "5e-3", "--max_steps", "12", "--per_device_train_batch_size", "4"),
        *("--dataloader_drop_last", "True", "--warmup_ratio", "0.1", "--ddp_find_unused_parameters", "False"),
        *("--logging_steps", "1", "--report_to", "none", "--use_cpu", "True", *more),
    ]


def run_command(command):
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result
