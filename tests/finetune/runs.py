"""Short trainings of tiny models, and what comes out of them."""

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
    return MatryoshkaRunner(
        model_args=MatryoshkaModelArguments(
            model_name_or_path=str(model), **({"lora_rank": 4, "lora_dropout": 0.0} | dict(model_args))
        ),
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
