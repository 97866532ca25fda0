"""Messages of other packages are left out only if this package causes them."""

import logging
import warnings

import pytest
from FlagEmbedding.abc.finetune.reranker import (
    AbsRerankerDataArguments,
    AbsRerankerModelArguments,
    AbsRerankerRunner,
    AbsRerankerTrainingArguments,
)
from peft import LoraConfig, get_peft_model
from transformers import MistralForCausalLM

from flagembedding_matryoshka import MatryoshkaReranker
from tests.finetune.runs import runner

LORA = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
DEPRECATED = "`is_gradient_checkpointing`"


class TheirRunner(AbsRerankerRunner):
    """FlagEmbedding's runner, without a model."""

    def load_tokenizer_and_model(self):
        return None, None

    def load_train_dataset(self):
        return None

    def load_data_collator(self):
        return None

    def load_trainer(self):
        return None


def test_flagembeddings_line_about_the_process_is_left_out_of_our_runs_alone(
    tiny_raw_model_path, training_file, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    runner(tiny_raw_model_path, training_file, tmp_path / "ours")
    assert "Process rank" not in caplog.text
    TheirRunner(
        AbsRerankerModelArguments(model_name_or_path=str(tiny_raw_model_path)),
        AbsRerankerDataArguments(train_data=[str(training_file)]),
        AbsRerankerTrainingArguments(output_dir=str(tmp_path / "theirs"), use_cpu=True),
    )
    assert "Process rank" in caplog.text


def test_pefts_deprecated_name_is_left_out_of_our_adapters_alone(tiny_raw_model_path, training_file, tmp_path):
    with pytest.warns(FutureWarning, match=DEPRECATED):
        get_peft_model(MistralForCausalLM.from_pretrained(tiny_raw_model_path), LORA).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=DEPRECATED)
        MatryoshkaReranker(str(tiny_raw_model_path), peft_path=str(tmp_path), dtype="float32", devices="cpu")
        runner(tiny_raw_model_path, training_file, tmp_path / "out")
