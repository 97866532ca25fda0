"""Two processes with sharded weights against one process with the same global batch."""

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, fully_shard

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.finetune import MatryoshkaRerankerModel
from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS
from flagembedding_matryoshka.finetune.sharding import unsharded_loading

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARDED = str(Path(__file__).with_name("sharded.py"))
PRODUCT = ("-m", "flagembedding_matryoshka.finetune")
PAIRS = [("what about the wing", "this text is about a wing"), ("what about the flow", "air")]
ADAPTERS, ALL_WEIGHTS = ("--lora_rank", "4"), ("--use_lora", "False")
STEPS = 6


def torchrun(processes, *program):
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", *program]


def accelerate(precision):
    """The example's configuration, but for the number of processes and, where rounding would hide faults, bfloat16."""
    config = ("--config_file", str(EXAMPLES / "fsdp.yaml"), "--mixed_precision", precision, "--num_processes", "2")
    return ["-m", "accelerate.commands.launch", *config, "--main_process_port", "0", SHARDED]


@pytest.fixture(scope="module")
def train(tiny_raw_model_path, training_file, tmp_path_factory):
    """Fine-tunes, two rows a pass and two passes a step in all processes, and returns the output directory."""

    def run(launcher, processes, *options):
        output_dir = tmp_path_factory.mktemp("out")
        command = [
            *(sys.executable, *launcher, "--model_name_or_path", str(tiny_raw_model_path), "--start_layer", "2"),
            *("--train_data", str(training_file), "--train_group_size", "4", "--query_max_len", "64"),
            *("--output_dir", str(output_dir), "--cache_path", str(output_dir / "cache"), "--use_cpu", "True"),
            *("--train_method", "distill_fix_layer_teacher", "--compress_layers", "2", "4"),
            *("--compress_ratios", "1", "2", "4", "--learning_rate", "5e-3", "--lr_scheduler_type", "constant"),
            # Adam divides by the gradient's size: where that is next to nothing, the order of a sum would decide.
            *("--adam_epsilon", "1e-3"),
            *("--max_steps", str(STEPS), "--save_steps", "3", "--logging_steps", "1", "--report_to", "none"),
            *("--per_device_train_batch_size", str(2 // processes), "--gradient_accumulation_steps", "2", *options),
        ]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert result.returncode == 0, result.stderr[-5000:]
        return output_dir

    return run


@pytest.fixture(scope="module")
def alone(train):
    """The output directories of one process, with adapters and with all weights."""
    return {weights: train(torchrun(1, *PRODUCT), 1, *weights) for weights in (ADAPTERS, ALL_WEIGHTS)}


def history(output_dir, *names, step=STEPS):
    state = json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [tuple(entry[name] for name in names) for entry in state["log_history"] if "loss" in entry]


def written(directory):
    return load_file(next(directory.glob("*model.safetensors")))


def scores(output_dir):
    reranker = MatryoshkaReranker(str(output_dir), dtype="float32", devices="cpu")
    return torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=[2, 4, 6], compress_layers=[2], compress_ratio=2))


def close(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=tolerance, rtol=0)


def check_against_one_process(output_dir, expected_dir):
    for (loss, norm), expected in zip(
        history(output_dir, "loss", "grad_norm"), history(expected_dir, "loss", "grad_norm"), strict=True
    ):
        assert (loss, norm) == pytest.approx(expected, rel=1e-4)
    close(written(output_dir), written(expected_dir))
    torch.testing.assert_close(scores(output_dir), scores(expected_dir), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        pytest.param(accelerate("no"), ADAPTERS, id="adapters, examples/fsdp.yaml"),
        pytest.param(accelerate("no"), (*ADAPTERS, "--gradient_checkpointing"), id="adapters, checkpointing"),
        pytest.param(torchrun(2, SHARDED), (*ALL_WEIGHTS, "--fsdp", "full_shard"), id="all weights, --fsdp"),
        pytest.param(
            torchrun(2, SHARDED),
            (*ALL_WEIGHTS, "--fsdp", "full_shard", "--gradient_checkpointing"),
            id="all weights, checkpointing",
        ),
    ],
)
def test_shards_learn_what_one_process_learns(launcher, options, train, alone):
    check_against_one_process(train(launcher, 2, *options), alone[options[:2]])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun(2, *PRODUCT), accelerate("no")], ids=["torchrun", "fsdp"])
def test_two_processes_teach_themselves_what_one_does(launcher, train):
    options = (*ADAPTERS, "--train_method", "self_distill")
    check_against_one_process(train(launcher, 2, *options), train(torchrun(1, *PRODUCT), 1, *options))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("weights", [ADAPTERS, (*ALL_WEIGHTS, "--gradient_checkpointing")])
def test_deepspeed_learns_what_one_process_learns(weights, stage, train, alone):
    config = ("--deepspeed", str(EXAMPLES / f"deepspeed_zero{stage}.json"))
    output_dir = train(torchrun(2, *PRODUCT), 2, *weights, *config)
    check_against_one_process(output_dir, alone[weights[:2]])
    assert list(output_dir.glob("checkpoint-6/global_step6/*zero_pp_rank_1_*optim_states.pt"))
    resumed = train(
        torchrun(2, *PRODUCT), 2, *weights, *config, "--resume_from_checkpoint", str(output_dir / "checkpoint-3")
    )
    close(written(resumed), written(output_dir), 0)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_resumed_run_of_shards_ends_in_the_same_weights(kept, train, tmp_path):
    config = tmp_path / "fsdp.json"
    config.write_text(json.dumps({"state_dict_type": kept}))
    options = (*ADAPTERS, "--fsdp", "full_shard", "--fsdp_config", str(config))
    whole = train(torchrun(2, SHARDED), 2, *options)
    resumed = train(torchrun(2, SHARDED), 2, *options, "--resume_from_checkpoint", str(whole / "checkpoint-3"))
    assert not (resumed / "checkpoint-3").exists()
    close(written(resumed), written(whole), 0)


@pytest.mark.slow
def test_the_best_checkpoint_of_shards_is_what_is_written(train, training_file):
    # The worst list counts as the best, so that it is not the last checkpoint's.
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "nDCG@10", "--greater_is_better", "False")
    options = (*ADAPTERS, "--fsdp", "full_shard", "--eval_data", str(training_file), *best)
    output_dir = train(torchrun(2, SHARDED), 2, *options)
    close(written(output_dir), written(output_dir / "checkpoint-3"), 0)
    assert any(
        (written(output_dir / "checkpoint-6")[name] != value).any() for name, value in written(output_dir).items()
    )


@pytest.mark.slow
def test_mixed_precision_does_not_round_the_loss_of_shards(train):
    alone = train(torchrun(1, *PRODUCT), 1, *ADAPTERS, "--bf16")
    shards = train(accelerate("bf16"), 2, *ADAPTERS)
    (loss, norm), (expected_loss, expected_norm) = (history(path, "loss", "grad_norm")[0] for path in (shards, alone))
    # Between 19.125 and 19.25 bfloat16 has nothing.
    assert loss == pytest.approx(expected_loss, rel=5e-4)
    assert norm == pytest.approx(expected_norm, rel=2e-2)


def test_fsdp_takes_the_model_that_learns(layerwise_model, tiny_tokenizer):
    base_model = copy.deepcopy(layerwise_model)
    model = MatryoshkaRerankerModel(base_model, tiny_tokenizer, TRAIN_METHODS["normal"], 1, 2)
    assert model._no_split_modules == {type(base_model.model.layers[0]).__name__}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model)
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(model, FSDPModule) and isinstance(model, MatryoshkaRerankerModel)


def test_parts_that_would_never_be_put_together_are_refused():
    zero = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=zero))
    message = r"needs .*stage3_gather_16bit_weights_on_model_save: true"
    with pytest.raises(ValueError, match=message), unsharded_loading(args):
        pass
