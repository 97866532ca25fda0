import json
import os
import re
import shutil
import signal
import subprocess
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import psutil
import pytest
import torch
import yaml
from FlagEmbedding.abc.finetune.reranker import (
    AbsRerankerDataArguments,
    AbsRerankerModelArguments,
    AbsRerankerTrainingArguments,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder
from transformers import MistralConfig, MistralForCausalLM, MistralForSequenceClassification

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.finetune import (
    MatryoshkaDataArguments,
    MatryoshkaModelArguments,
    MatryoshkaRunner,
    MatryoshkaTrainingArguments,
)
from flagembedding_matryoshka.finetune.__main__ import build_parser
from flagembedding_matryoshka.finetune.arguments import convert_arguments
from flagembedding_matryoshka.finetune.checkpoints import locked
from flagembedding_matryoshka.finetune.collapse import TrainingCollapsedError
from flagembedding_matryoshka.finetune.sampling import sample_setting
from flagembedding_matryoshka.inference.engine import Engine
from flagembedding_matryoshka.models.layers import CostWiseLayer
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.templates import Template
from tests.backbones import write_raw
from tests.finetune.runs import PAIRS, WIDTHS, close, command_line, run_command, runner, scores_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tied_raw_model_path(tiny_raw_model_path, tiny_tokenizer, tmp_path_factory):
    """A checkpoint whose vocabulary head is its embedding, and is not stored."""
    path = tmp_path_factory.mktemp("tied")
    config = MistralConfig.from_pretrained(tiny_raw_model_path)
    config.tie_word_embeddings = True
    torch.manual_seed(3)
    MistralForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    return path


@pytest.fixture
def no_weights(tiny_raw_model_path, tmp_path):
    """A checkpoint that can be described, but not loaded."""
    path = shutil.copytree(tiny_raw_model_path, tmp_path / "no_weights")
    (path / "model.safetensors").unlink()
    return path


MATRICES = "down_proj, embed_tokens, gate_proj, k_proj, linear_head, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target_modules": ["q_proj", "nosuch_proj"]},
            f"target_modules: a mistral re-ranker has no nosuch_proj. It has {MATRICES}.",
        ),
        ({"target_modules": ["proj", "qkv_proj", "k_proj"]}, f"has no proj, qkv_proj. It has {MATRICES}."),
        ({"target_modules": ["self_attn"]}, f"has no self_attn. It has {MATRICES}."),
        ({"target_modules": ["lm_head"]}, f"has no lm_head. It has {MATRICES}."),
        (
            {"target_modules": [r"q_proj|k_proj"]},
            "matches the whole name of no linear module, such as 'lm_head.2.linear_he",
        ),
        ({"modules_to_save": ["norm", "score"]}, "modules_to_save: a mistral re-ranker has no score. It has down_proj"),
        (
            {"modules_to_save": ["lm_head"]},
            "has no lm_head. It has down_proj, embed_tokens, gate_proj, input_layernorm",
        ),
    ],
    ids=str,
)
def test_modules_that_are_not_there_are_named_before_weights_are_read(
    arguments, message, no_weights, training_file, tmp_path
):
    with pytest.raises(ValueError, match=re.escape(message)):
        runner(no_weights, training_file, tmp_path / "out", arguments)


@pytest.mark.parametrize("given", ["model_name_or_path", "raw_peft", "from_peft"])
def test_training_reads_pickled_weights_only_if_it_is_told_to(given, tiny_raw_model_path, training_file, tmp_path):
    base, options = shutil.copytree(tiny_raw_model_path, tmp_path / "base"), {}
    place, weights, file = base, "model.safetensors", "pytorch_model.bin"
    if given != "model_name_or_path":
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        place, weights, file = tmp_path / "adapter", "adapter_model.safetensors", "adapter_model.bin"
        get_peft_model(MistralForCausalLM.from_pretrained(base), config).save_pretrained(place)
        options = {given: str(place) if given == "from_peft" else [str(place)]}
    torch.save(load_file(place / weights), place / file)
    (place / weights).unlink()
    with pytest.raises(ValueError, match=rf"pickled \({file}\), .* allow_pickle=True \(--allow_pickle\)"):
        runner(base, training_file, tmp_path / "out", options)
    runner(base, training_file, tmp_path / "out", {**options, "allow_pickle": True})


def test_split_names_of_a_fused_model_are_refused(tiny_tokenizer, training_file, tmp_path):
    base = write_raw("phi3", tiny_tokenizer, tmp_path / "phi3")
    known = "down_proj, embed_tokens, gate_up_proj, linear_head, o_proj, qkv_proj"
    with pytest.raises(ValueError, match=rf"a phi3 re-ranker has no q_proj, k_proj\. It has {known}\."):
        runner(base, training_file, tmp_path / "out", {"target_modules": ["q_proj", "k_proj", "o_proj"]})


@pytest.mark.parametrize(
    ("target_modules", "adapted"),
    [
        (["q_proj", "linear_head"], {"q_proj", "linear_head"}),
        (["self_attn.q_proj"], {"q_proj"}),
        ([r".*layers\.[13]\.self_attn\.(q|v)_proj"], {"q_proj", "v_proj"}),
        (["all-linear"], {*MATRICES.split(", ")} - {"embed_tokens"}),
        ("all-linear", {*MATRICES.split(", ")} - {"embed_tokens"}),
        (None, {*MATRICES.split(", ")} - {"embed_tokens"}),
    ],
    ids=["names", "the end of a name", "a pattern", "all in a list", "all", "none"],
)
def test_modules_that_get_an_adapter(target_modules, adapted, tiny_raw_model_path, training_file, tmp_path):
    run = runner(tiny_raw_model_path, training_file, tmp_path / "out", {"target_modules": target_modules})
    found = {name.rpartition(".lora_")[0] for name, value in run.model.named_parameters() if value.requires_grad}
    assert {name.rpartition(".")[2] for name in found} == adapted
    if target_modules and "layers" in target_modules[0]:
        assert {name.split("layers.")[1][0] for name in found} == {"1", "3"}


def write_adapter(kind, base, path):
    """An adapter that transformers and peft write for the raw checkpoint at `base`."""
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    if kind == "classifier":
        model = MistralForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=3)
        options |= {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    else:
        model = MistralForCausalLM.from_pretrained(base)
        if kind == "grown":
            model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("language model", "grown")), "classifier"]
)
def test_training_starts_from_an_adapter_of_another_trainer(kind, tiny_raw_model_path, training_file, tmp_path):
    """It is merged before the heads are initialised, and when the trained model is loaded; it cannot be continued."""
    adapter = write_adapter(kind, tiny_raw_model_path, tmp_path / "adapter")
    options = {"dtype": "float32", "devices": "cpu", "template": "cost_wise"}
    expected = scores_of(MatryoshkaReranker(adapter, **options))
    starts = [(adapter, {})]
    if kind != "classifier":
        starts.append((tiny_raw_model_path, {"raw_peft": [adapter]}))
    for number, (base, arguments) in enumerate(starts):
        out = tmp_path / f"out_{number}"
        arguments = arguments | {"head_scale": 1.0, "template": "cost_wise", "save_merged_lora_model": True}
        runner(base, training_file, out, arguments, learning_rate=1e-9).run()
        for path in (out, out / "merged_model"):
            close(scores_of(MatryoshkaReranker(path, dtype="float32", devices="cpu")), expected)
    with pytest.raises(ValueError, match=r"adapter .*changes (lm_head|score)\..* give the raw checkpoint, with the"):
        runner(tiny_raw_model_path, training_file, tmp_path / "third", {"from_peft": adapter})


@pytest.mark.parametrize("start", ["raw", "tied", "layer-wise", "merged adapters", "fine-tuned", "all weights"])
def test_what_is_written_scores_as_what_was_trained(
    start, tiny_raw_model_path, tied_raw_model_path, tiny_layerwise_path, training_file, tmp_path
):
    model, model_args = tiny_raw_model_path, {"start_layer": 2}
    if start == "tied":
        model = tied_raw_model_path
    elif start == "layer-wise":
        model, model_args = tiny_layerwise_path, {}
    elif start == "all weights":
        model_args["use_lora"] = False
    elif start in ("merged adapters", "fine-tuned"):
        runner(model, training_file, tmp_path / "stage1", model_args).run()
        if start == "fine-tuned":
            model, model_args = tmp_path / "stage1", {}
        else:
            model_args["raw_peft"] = [str(tmp_path / "stage1")]
    run = runner(model, training_file, tmp_path / "out", model_args, seed=7)
    in_memory = run.model.model
    before = {name: value.clone() for name, value in in_memory.state_dict().items()}
    run.run()
    changed = [name for name, value in in_memory.state_dict().items() if not torch.equal(value, before[name])]
    assert any("linear_head" in name for name in changed)

    loaded = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    assert loaded.config.exit_layers == [2, 3, 4, 5, 6]
    written = [scores_of(loaded, **width) for width in WIDTHS]
    by_path = CrossEncoder(str(tmp_path / "out"), device="cpu", trust_remote_code=True, local_files_only=True)
    close(torch.tensor(by_path.predict(PAIRS)), written[0][-1])
    trained = in_memory.get_base_model() if isinstance(in_memory, PeftModel) else in_memory
    loaded._engine = Engine(trained.eval())
    for width, scores in zip(WIDTHS, written, strict=True):
        close(scores, scores_of(loaded, **width))


def test_exits_one_by_one_train_a_part_of_the_base_and_are_found_again(tiny_raw_model_path, training_file, tmp_path):
    run = runner(tiny_raw_model_path, training_file, tmp_path / "out", {"exits": [2, 5]}, exit_weights=[0.5, 1.0])
    assert len(run.model.model.get_base_model().model.layers) == 5
    run.run()
    loaded = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    assert loaded.config.exit_layers == [2, 5] and loaded.config.num_hidden_layers == 5
    trained = scores_of(loaded)
    loaded._engine = Engine(run.model.model.get_base_model().eval())
    close(trained, scores_of(loaded))
    shallow = MatryoshkaReranker(str(tmp_path / "out"), max_layer=3, dtype="float32", devices="cpu")
    assert shallow.config.exit_layers == [2]
    close(scores_of(shallow)[None], trained[:1])


@pytest.mark.slow
def test_adapters_go_on_learning_and_never_go_into_the_heads_of_other_exits(
    tiny_raw_model_path, training_file, tmp_path
):
    first, second = tmp_path / "first", tmp_path / "second"
    runner(tiny_raw_model_path, training_file, first, {"exits": [2, 5]}).run()
    go_on = {"exits": [2, 5], "from_peft": str(first)}
    run = runner(tiny_raw_model_path, training_file, second, go_on)
    loaded = MatryoshkaReranker(str(first), dtype="float32", devices="cpu")
    expected = scores_of(loaded)
    loaded._engine = Engine(run.model.model.get_base_model().eval())
    close(scores_of(loaded), expected)
    run.run()
    assert not torch.allclose(scores_of(MatryoshkaReranker(str(second), dtype="float32", devices="cpu")), expected)
    message = r"first is for the exits \[2, 5\], but the model has \[3, 5\]"
    for argument in ({"from_peft": str(first)}, {"raw_peft": [str(first)]}):
        with pytest.raises(ValueError, match=message):
            runner(tiny_raw_model_path, training_file, second, {"exits": [3, 5], **argument})


def test_an_exit_weighs_what_it_is_given(tiny_raw_model_path, training_file, tmp_path):
    losses = {}
    for weights in ([1.0, 0.0], [0.0, 1.0], [2.0, 3.0]):
        run = runner(tiny_raw_model_path, training_file, tmp_path / "out", {"exits": [2, 5]}, exit_weights=weights)
        torch.manual_seed(0)
        batch = run.data_collator([run.train_dataset[item] for item in range(4)])
        losses[tuple(weights)] = run.model.train()(**batch).loss.item()
    assert losses[2.0, 3.0] == pytest.approx(2 * losses[1.0, 0.0] + 3 * losses[0.0, 1.0], rel=1e-5)
    with pytest.raises(ValueError, match=r"exit_weights are \[1\.0\], but must be one for each exit: \[2, 5\]"):
        runner(tiny_raw_model_path, training_file, tmp_path / "out", {"exits": [2, 5]}, exit_weights=[1.0])


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"exits": [5, 2]}, r"exits \[5, 2\] must be layers in ascending order"),
        ({"exits": [2, 9]}, r"exits \[2, 9\] must be .* num_hidden_layers=6"),
        ({"exits": [2], "start_layer": 3}, r"exits=\[2\] say all: leave out start_layer=3"),
        ({"max_layer": 9, "start_layer": 2}, "max_layer=9 leaves no exit or no layer"),
        ({"head_scale": 0.0}, "head_scale is 0.0, but must be above 0"),
    ],
)
def test_exits_that_do_not_exist_are_refused(tiny_raw_model_path, training_file, tmp_path, model_args, message):
    with pytest.raises(ValueError, match=message):
        runner(tiny_raw_model_path, training_file, tmp_path / "out", model_args)


def test_heads_start_where_the_loss_is_that_of_chance(tiny_raw_model_path, training_file, tmp_path):
    scores = {}
    for scale in (1.0, 0.1):
        run = runner(tiny_raw_model_path, training_file, tmp_path / "out", {"start_layer": 2, "head_scale": scale})
        batch = run.data_collator([run.train_dataset[item] for item in range(4)])
        scores[scale] = run.model.eval()(pair=batch["pair"]).scores
    close(scores[0.1], scores[1.0] / 10)


def test_bfloat16_trains_adapters_in_float32_over_frozen_weights_in_bfloat16(
    tiny_raw_model_path, training_file, tmp_path
):
    run = runner(tiny_raw_model_path, training_file, tmp_path / "out", {"start_layer": 2}, bf16=True, logging_steps=1)
    frozen = {name: value.dtype for name, value in run.model.named_parameters() if not value.requires_grad}
    assert {dtype for name, dtype in frozen.items() if "linear_head" not in name} == {torch.bfloat16}
    assert {value.dtype for value in run.model.parameters() if value.requires_grad} == {torch.float32}
    run.run()
    plain = runner(tiny_raw_model_path, training_file, tmp_path / "plain", {"start_layer": 2}, logging_steps=1)
    plain.run()
    losses = [r.trainer.state.log_history[0]["loss"] for r in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_autocast_keeps_no_second_copy_of_what_adapters_are_fed(
    tiny_raw_model_path, training_file, tmp_path, monkeypatch
):
    from flagembedding_matryoshka.finetune import trainer

    monkeypatch.setattr(trainer, "fold_adapters", lambda model: 0)  # as where adapters cannot be folded
    kept = []

    def note(tensor):
        kept[-1].append(tensor)
        return tensor

    for name in ("ours", "plain"):
        kept.append([])
        run = runner(tiny_raw_model_path, training_file, tmp_path / name, {"start_layer": 2}, bf16=True, max_steps=1)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run.run()
        monkeypatch.setattr(trainer, "disable_input_dtype_casting", lambda model, active: nullcontext())
    storages = [
        {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors} for tensors in kept
    ]
    bytes_kept = [sum(storage.nbytes() for storage in each.values()) for each in storages]
    assert bytes_kept[0] < bytes_kept[1]
    ours, plain = (trained_weights(tmp_path / name) for name in ("ours", "plain"))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("method", "use_lora"),
    [("distill_fix_layer_teacher", True), ("distill_fix_layer_teacher", False), ("self_distill", True)],
)
@pytest.mark.parametrize(
    "setting", [Setting((2, 3, 4, 5, 6), (2,), 2), Setting((4, 5, 6), (3,), 2, store_layer=3)], ids=str
)
def test_every_trained_tensor_has_a_gradient_in_bfloat16_with_compression(
    setting, method, use_lora, checkpointing, tiny_raw_model_path, training_file, tmp_path
):
    """A pass without gradients must not fill autocast's cache of weights, from which torch before 2.11 takes them."""
    arguments = tiny_raw_model_path, training_file, tmp_path / "out", {"start_layer": 2, "use_lora": use_lora}
    options = {"compress_layers": [2], "compress_ratios": [2], "train_method": method}
    run = runner(*arguments, bf16=True, gradient_checkpointing=checkpointing, **options)
    batch = run.data_collator([run.train_dataset[item] for item in range(4)])
    if checkpointing:
        run.model.gradient_checkpointing_enable()
    caching = []

    def record(*_):
        if not torch.is_grad_enabled():
            caching.append(torch.is_autocast_cache_enabled())

    for layer in run.model.modules():
        if isinstance(layer, CostWiseLayer):
            layer.register_forward_pre_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run.model.train()(**batch, setting=setting).loss
    loss.backward()
    assert [name for name, value in run.model.named_parameters() if value.requires_grad and value.grad is None] == []
    assert caching and not any(caching)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_adapters_learn_over_weights_in_four_bits(tiny_raw_model_path, training_file, tmp_path):
    model_args = {"start_layer": 2, "load_in_4bit": True}
    run = runner(tiny_raw_model_path, training_file, tmp_path / "out", model_args, max_steps=20, logging_steps=1)
    weights = {name: value.dtype for name, value in run.model.model.named_parameters()}
    assert weights["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"] == torch.uint8
    run.run()
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    loaded = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    rows = [json.loads(line) for line in training_file.read_text().splitlines()]
    pairs = [[(row["query"], row[name][0]) for row in rows] for name in ("pos", "neg")]
    relevant, other = (torch.tensor(loaded.compute_score(part, cutoff_layers=[2, 6])).mean(1) for part in pairs)
    assert (relevant > other).all()


def test_the_merged_model_is_a_checkpoint_of_its_own(tiny_raw_model_path, training_file, tmp_path):
    model_args = {"start_layer": 2, "save_merged_lora_model": True}
    runner(tiny_raw_model_path, training_file, tmp_path / "out", model_args).run()
    adapters = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    merged = MatryoshkaReranker(str(tmp_path / "out" / "merged_model"), dtype="float32", from_raw=False, devices="cpu")
    close(scores_of(merged), scores_of(adapters))


@pytest.mark.parametrize("method", [pytest.param("normal", marks=pytest.mark.slow), "distill_fix_layer_teacher"])
def test_the_loss_goes_down_at_every_width(method, tiny_raw_model_path, training_file, tmp_path):
    run = runner(
        tiny_raw_model_path,
        training_file,
        tmp_path / "out",
        {"start_layer": 2},
        train_method=method,
        max_steps=40,
        learning_rate=5e-3,
        compress_layers=[2, 4],
        compress_ratios=[1, 2, 4],
        logging_steps=1,
    )
    run.run()
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_gradient_checkpointing_learns_the_same(tiny_raw_model_path, training_file, tmp_path, recwarn):
    """Its name in FlagEmbedding's command lines is accepted without a warning."""
    losses = []
    for checkpointing in (False, True):
        run = runner(
            tiny_raw_model_path,
            training_file,
            tmp_path / str(checkpointing),
            {"start_layer": 2},
            gradient_checkpointing=checkpointing,
            train_method="distill_fix_layer_teacher",
            compress_layers=[2],
            compress_ratios=[2],
            logging_steps=1,
            max_steps=3,
        )
        run.run()
        losses.append([entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry])
        layers = run.model.model.get_base_model().model.layers
        assert {layer.gradient_checkpointing for layer in layers} == {checkpointing}
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    dropped = [str(warning.message) for warning in recwarn if "v6" in str(warning.message)]
    assert not [message for message in dropped if "`is_gradient_checkpointing`" not in message]  # peft's, see quiet.py


@pytest.mark.parametrize("use_lora", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(use_lora, tiny_raw_model_path, training_file, tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "compress_layers": [2, 4],
        "compress_ratios": [1, 2, 4],
    }
    histories = []
    for resume_from in (None, str(tmp_path / "out" / "checkpoint-2")):
        model_args = {"start_layer": 2, "use_lora": use_lora}
        arguments = (tiny_raw_model_path, training_file, tmp_path / "out", model_args)
        run = runner(*arguments, resume_from_checkpoint=resume_from, **options)
        run.run()
        histories.append([entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry])
    assert histories[1] == pytest.approx(histories[0], rel=1e-5)


def test_the_history_has_every_term_of_the_loss(tiny_raw_model_path, training_file, tmp_path):
    run = runner(
        tiny_raw_model_path,
        training_file,
        tmp_path / "out",
        {"start_layer": 5},
        train_method="distill_last_layer",
        distill_loss="kl",
        gradient_accumulation_steps=2,
        logging_steps=1,
        compress_layers=[2],
        compress_ratios=[1, 2],
    )
    run.run()
    history = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    for entry in history:
        terms = {name: value for name, value in entry.items() if name.startswith("loss_layer")}
        assert set(terms) == {
            "loss_layer_5_contrastive", "loss_layer_5_deeper_exit",
            "loss_layer_6_contrastive", "loss_layer_6_data_scores",
        }  # fmt: skip
        assert sum(terms.values()) == pytest.approx(entry["loss"], rel=1e-4)


def test_grades_train_every_exit(tiny_raw_model_path, tmp_path):
    row = {"passages": ["air", "flow", "heat", "drag"], "labels": [2, 0, 1, 0], "scores": [0.5, 0.1, 0.4, 0.2]}
    data = tmp_path / "graded.jsonl"
    data.write_text("".join(json.dumps({"query": f"wing {name}", **row}) + "\n" for name in "abcd"))
    losses = {"label_loss": "ranknet", "label_weight": 0.5, "distill_weight": 3.0, "deeper_exit_weight": 2.0}
    arguments = tiny_raw_model_path, data, tmp_path / "out", {"start_layer": 5}
    run = runner(*arguments, train_method="distill_last_layer", logging_steps=1, max_steps=1, **losses)
    run.run()
    entry = run.trainer.state.log_history[0]
    terms = {"5_ranknet": 0.5, "6_ranknet": 0.5, "5_deeper_exit": 2.0, "6_data_scores": 3.0}
    assert {name for name in entry if name.startswith("loss_")} == {f"loss_layer_{name}" for name in terms}
    expected = sum(weight * entry[f"loss_layer_{name}"] for name, weight in terms.items())
    assert entry["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", ['{"use_dora": true}', '{"use_rslora": true}'])
def test_options_of_peft_are_trained_written_and_loaded(options, tiny_raw_model_path, training_file, tmp_path, caplog):
    out = tmp_path / "out"
    run = runner(tiny_raw_model_path, training_file, out, {"start_layer": 5, "lora_options": options})
    before = trained_parameters(run)
    with caplog.at_level("INFO", "flagembedding_matryoshka.finetune.runner"):
        run.run()
    changed = [name for name, value in trained_parameters(run).items() if not torch.equal(value, before[name])]
    assert any(("magnitude" if "dora" in options else "lora_B") in name for name in changed)
    config = json.loads((out / "adapter_config.json").read_text())
    assert all(config[name] is True for name in json.loads(options))
    loaded = MatryoshkaReranker(str(out), dtype="float32", devices="cpu")
    scores = scores_of(loaded)
    loaded._engine = Engine(run.model.model.get_base_model().eval())
    close(scores, scores_of(loaded))
    (line,) = [message for message in caplog.messages if "tokens/s" in message]
    assert re.search(r"\d % of the peak of a matrix product in float32\. .* save \d+ % .* are truncated\.$", line)
    written = yaml.safe_load((out / "run.yaml").read_text())
    assert written["lora_options"] == json.loads(options) and written["max_steps"] == 2


def trained_parameters(run):
    return {name: value.detach().clone() for name, value in run.model.named_parameters() if value.requires_grad}


@pytest.mark.slow
def test_a_run_stops_when_it_gets_no_better_resumed_or_not(tiny_raw_model_path, training_file, tmp_path):
    def run(**more):
        options = {"early_stopping_patience": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 9} | more
        data_args = {"eval_data": [str(training_file)]}
        found = runner(tiny_raw_model_path, training_file, tmp_path / "out", {"start_layer": 5}, data_args, **options)
        found.run()
        return found.trainer.state

    state = run(learning_rate=1e-12)
    assert (state.global_step, state.best_global_step) == (3, 1)
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    for _ in ("killed before its end", "stopped"):
        assert run(learning_rate=1e-12, resume_from_checkpoint="last").global_step == 3
    with pytest.raises(ValueError, match=r"eval_strategy=.* need eval_data"):
        options = {"early_stopping_patience": 2, "save_strategy": "steps"}
        runner(tiny_raw_model_path, training_file, tmp_path / "other", **options)


def test_only_the_latest_entries_of_the_history_keep_the_terms(
    tiny_raw_model_path, training_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("flagembedding_matryoshka.finetune.trainer.DETAILED_LOGS", 2)
    run = runner(tiny_raw_model_path, training_file, tmp_path / "out", {"start_layer": 5}, max_steps=4, logging_steps=1)
    run.run()
    history = run.trainer.state.log_history
    assert all("loss" in entry and "tokens" in entry for entry in history[:4])
    # The last entry is that of the end of the training.
    assert ["loss_layer_5_contrastive" in entry for entry in history] == [False, False, False, True, False]
    assert ["layer_6_spread" in entry for entry in history] == [False, False, False, True, False]


def test_a_run_without_a_log_keeps_one_sum_of_the_terms(tiny_raw_model_path, training_file, tmp_path):
    arguments = tiny_raw_model_path, training_file, tmp_path / "out", {"start_layer": 5}
    run = runner(*arguments, max_steps=3, logging_strategy="no")
    held = []
    compute_loss = run.trainer.compute_loss

    def counted(*args, **kwargs):
        found = compute_loss(*args, **kwargs)
        values = vars(run.trainer).values()
        held.append(sum(value.numel() for value in values if isinstance(value, torch.Tensor)))
        held[-1] += sum(len(value) for value in values if isinstance(value, list))
        return found

    run.trainer.compute_loss = counted
    run.run()
    assert len(held) == 3 and len(set(held)) == 1


def test_the_hubs_token_is_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    given = MatryoshkaModelArguments(model_name_or_path="x", token="hf_given")
    theirs = convert_arguments(MatryoshkaModelArguments, AbsRerankerModelArguments(model_name_or_path="x"))
    shown = (repr(given), str(theirs), build_parser().format_help())
    assert not any("hf_secret" in text or "hf_given" in text for text in shown)
    assert given.token == "hf_given"


def test_evaluation_ranks_at_every_exit_and_keeps_the_best_checkpoint(tiny_raw_model_path, training_file, tmp_path):
    run = runner(
        tiny_raw_model_path,
        training_file,
        tmp_path / "out",
        {"start_layer": 5},
        {"eval_data": [str(training_file)]},
        save_strategy="steps",
        save_steps=5,
        save_total_limit=1,
        max_steps=20,
        learning_rate=5e-3,
    )
    before = run.trainer.evaluate()
    run.run()
    history = [entry for entry in run.trainer.state.log_history if "eval_nDCG@10" in entry]
    assert [entry["step"] for entry in history] == [5, 10, 15, 20]
    for layer in (5, 6):
        assert history[-1][f"eval_layer_{layer}_MRR@10"] > before[f"eval_layer_{layer}_MRR@10"]
    best = max(history, key=lambda entry: entry["eval_nDCG@10"])
    assert (tmp_path / "out" / f"checkpoint-{best['step']}").is_dir()
    assert run.trainer.state.best_global_step == best["step"]


def test_lists_of_different_lengths_are_evaluated_and_the_best_checkpoint_is_what_is_written(
    tiny_raw_model_path, training_file, tmp_path
):
    rows = [json.loads(line) for line in training_file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["neg"] = row["neg"][: number + 1]
        del row["pos_scores"], row["neg_scores"]
    lists = tmp_path / "lists.jsonl"
    lists.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = runner(
        tiny_raw_model_path,
        training_file,
        tmp_path / "out",
        {"start_layer": 2},
        {"eval_data": [str(lists)]},
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        per_device_eval_batch_size=1,
        load_best_model_at_end=True,
    )
    assert (run.training_args.metric_for_best_model, run.training_args.greater_is_better) == ("nDCG@10", True)
    # The first checkpoint is made the best, so that it differs from the last one.
    run.training_args.metric_for_best_model, run.training_args.greater_is_better = "eval_step", False
    metrics = run.trainer.compute_metrics
    run.trainer.compute_metrics = lambda found: metrics(found) | {"step": run.trainer.state.global_step}
    run.run()
    assert run.trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    first, last, written = (
        load_file(tmp_path / "out" / folder / "adapter_model.safetensors")
        for folder in ("checkpoint-1", "checkpoint-3", "")
    )
    assert all(torch.equal(written[name], first[name]) for name in first)
    assert any(not torch.equal(written[name], last[name]) for name in last)


def test_all_lists_are_evaluated_whatever_training_drops(tiny_raw_model_path, training_file, tmp_path):
    found = []
    for drop_last in (False, True):
        run = runner(
            tiny_raw_model_path,
            training_file,
            tmp_path / "out",
            {"start_layer": 5},
            {"eval_data": [str(training_file)]},
            save_strategy="steps",
            per_device_eval_batch_size=3,
            dataloader_drop_last=drop_last,
        )
        found.append({name: value for name, value in run.trainer.evaluate().items() if "@10" in name})
        assert run.training_args.dataloader_drop_last == drop_last
    assert found[0] and found[0] == found[1]


def test_evaluation_without_checkpoints_is_refused(tiny_raw_model_path, training_file, tmp_path):
    with pytest.raises(ValueError, match="set one of them, or leave eval_data out"):
        runner(tiny_raw_model_path, training_file, tmp_path / "out", {}, {"eval_data": [str(training_file)]})
    best = {"load_best_model_at_end": True, "save_strategy": "steps"}
    with pytest.raises(ValueError, match="load_best_model_at_end=True need eval_data"):
        runner(tiny_raw_model_path, training_file, tmp_path / "out", **best)


def test_bad_lines_can_be_left_out(tiny_raw_model_path, training_file, tmp_path, caplog):
    path = tmp_path / "some_bad.jsonl"
    path.write_text("{\n" + training_file.read_text() + json.dumps({"query": "q"}))
    with pytest.raises(ValueError, match=r"some_bad\.jsonl, line 1: not JSON"):
        runner(tiny_raw_model_path, path, tmp_path / "out")
    kept = runner(tiny_raw_model_path, path, tmp_path / "out", {}, {"skip_bad_lines": True}).train_dataset
    assert "2 bad lines are left out" in caplog.text
    assert list(kept.dataset) == list(
        runner(tiny_raw_model_path, training_file, tmp_path / "out").train_dataset.dataset
    )


@pytest.mark.slow
@pytest.mark.parametrize("train_method", ["normal", "self_distill"])
def test_a_run_that_learns_nothing_can_be_stopped(
    train_method, tiny_raw_model_path, training_file, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("flagembedding_matryoshka.finetune.collapse.PATIENCE", 2)
    options = {"learning_rate": 1e-9, "max_steps": 4, "logging_steps": 1, "train_method": train_method}
    model_args = {"start_layer": 6, "head_scale": 1e-6}
    runner(tiny_raw_model_path, training_file, tmp_path / "out", model_args, **options).run()
    assert caplog.text.count("After 2 steps every exit gives equal scores") == 1
    stopped = runner(
        tiny_raw_model_path, training_file, tmp_path / "stopped", model_args, stop_on_collapse=True, **options
    )
    with pytest.raises(TrainingCollapsedError, match="after 2 steps every exit gives equal scores"):
        stopped.run()
    assert stopped.trainer.state.global_step == 2


def test_a_loss_that_is_no_number_is_told_though_it_is_not_logged(tiny_raw_model_path, training_file, tmp_path, caplog):
    options = {"learning_rate": 1e30, "max_steps": 3, "logging_steps": 1, "max_grad_norm": 0.0}
    runner(tiny_raw_model_path, training_file, tmp_path / "out", {"start_layer": 5}, **options).run()
    assert caplog.text.count("the loss of the exits [5, 6] is not finite") == 1


def test_settings_count_on_through_accumulation(tiny_raw_model_path, training_file, tmp_path, monkeypatch):
    steps = []
    from flagembedding_matryoshka.finetune import trainer

    def recorded(config, layers, ratios, seed, step, store_layers):
        steps.append(step)
        return sample_setting(config, layers, ratios, seed, step, store_layers)

    monkeypatch.setattr(trainer, "sample_setting", recorded)
    runner(
        tiny_raw_model_path,
        training_file,
        tmp_path / "out",
        {"start_layer": 2},
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_steps=3,
    ).run()
    assert steps == list(range(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_method": "distil"}, "train_method is 'distil', but must be one of"),
        ({"compress_ratios": [3]}, r"compress_ratios are \[3\], but must be among"),
        ({"compress_ratios": [2, 4]}, r"compress_ratios \[2, 4\] need compress_layers"),
        (
            {"finetune_type": "layer", "compress_layers": [2], "compress_ratios": [1, 2]},
            r"without compression, but compress_ratios are \[1, 2",
        ),
        (
            {"finetune_type": "token", "compress_layers": [2], "compress_ratios": [1]},
            r"token trains an adapter for one ratio above 1, but compress_ratios are \[1\]",
        ),
        (
            {"finetune_type": "token", "compress_layers": [2], "compress_ratios": [2, 4]},
            r"compress_ratios are \[2, 4\]",
        ),
        ({"finetune_type": "token"}, r"compress_ratios \[2\] need compress_layers"),
        ({"store_layers": [3, 0]}, r"store_layers are \[3, 0\], but must be at least 1"),
        ({"distill_loss": "l1"}, "distill_loss is 'l1', but must be one of"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0, but must be at least 1"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold=0.1 needs early_stopping_patience"),
        ({"label_loss": "hinge"}, "label_loss is 'hinge', but must be one of"),
        ({"distill_temperature": 2.0}, "distill_temperature=2.0 has no effect: train_method normal has no such term"),
        ({"train_method": "distill", "distill_loss": "mse", "distill_temperature": 2.0}, "=2.0 needs distill_loss ce"),
        (
            {"train_method": "distill", "deeper_exit_weight": 2.0},
            "deeper_exit_weight=2.0 has no effect: train_method d",
        ),
        (
            {"train_method": "self_distill", "label_loss": "bce"},
            "label_loss=bce has no effect: train_method self_disti",
        ),
        ({"label_weight": -1.0}, "the weights are .*-1.0.*, but must be at least 0"),
        ({"label_weight": 0.0}, "the weights of all terms are 0"),
        ({"finetune_type": "width"}, "finetune_type is 'width'"),
        ({"sub_batch_size": 2}, "sub_batch_size=2"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 is not supported"),
        ({"fp16": True}, "fp16=True needs a GPU, and this run is on the CPU"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_length'"),
        ({"compress_layers": [0], "compress_ratios": [2]}, r"compress_layers \[0\] do not exist"),
        ({"compress_layers": [7], "compress_ratios": [1]}, r"compress_layers \[7\] do not exist"),
        ({"store_layers": [2, 6]}, r"cutoff_layers \[6\] do not lie above store_layer=6"),
    ],
)
def test_bad_training_arguments_are_named(options, message, tiny_raw_model_path, training_file, tmp_path):
    with pytest.raises(ValueError, match=message):
        runner(tiny_raw_model_path, training_file, tmp_path / "out", **options)


def test_bfloat16_without_instructions_for_it_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.warns(UserWarning, match="bfloat16 is several times slower than float32 on this processor"):
        MatryoshkaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_side": "left"}, "padding_side is 'left'"),
        ({"loss_type": "hidden"}, "loss_type is 'hidden'"),
        ({"head_multi": False}, "head_multi is False"),
        ({"head_type": "complex"}, "head_type is 'complex'"),
        ({"use_lora": False, "load_in_4bit": True}, "load_in_4bit=True contradicts use_lora=False"),
        ({"layer_wise": False}, "layer_wise is False"),
        ({"config_name": "x"}, "config_name is 'x'"),
        ({"model_type": "encoder"}, "model_type is 'encoder'"),
        ({"use_lora": False, "from_peft": "x"}, "use_lora=False contradicts"),
        ({"from_peft": "x", "lora_rank": 32}, r"from_peft=x continues an adapter .* but \{'lora_rank': 32\} is given"),
        ({"from_peft": "x", "modules_to_save": ["norm"]}, r"but \{'modules_to_save': \['norm'\]\} is given"),
    ],
)
def test_arguments_without_use_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaModelArguments(model_name_or_path="x", **options)


@pytest.mark.parametrize(
    ("finetune_type", "expected"),
    [
        (None, ("distill_fix_layer_teacher", 2e-4, [1, 2, 4, 8])),
        ("layer", ("normal", 2e-5, [1])),
        ("token", ("normal", 2e-5, [2])),
    ],
)
def test_finetune_type_sets_defaults_that_can_be_overridden(finetune_type, expected, tmp_path):
    def arguments(**options):
        args = MatryoshkaTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, compress_layers=[2], finetune_type=finetune_type, **options
        )
        return args.train_method, args.learning_rate, args.compress_ratios

    assert arguments() == expected
    assert arguments(learning_rate=1e-3, train_method="distill")[:2] == ("distill", 1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that could run the kernel")
def test_flash_attention_is_refused_where_it_cannot_run(tiny_raw_model_path, training_file, tmp_path):
    with pytest.raises(ValueError, match="use_flash_attn=True needs a GPU and --bf16 or --fp16; this run is on cpu"):
        runner(tiny_raw_model_path, training_file, tmp_path / "out", {"use_flash_attn": True})


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_is_named_where_it_is_missing(tiny_raw_model_path, training_file, tmp_path):
    with pytest.raises(ImportError, match=r"deepspeed=stage1\.json needs the package deepspeed"):
        runner(tiny_raw_model_path, training_file, tmp_path / "out", deepspeed="stage1.json")


def test_a_process_with_several_gpus_is_refused(tiny_raw_model_path, training_file, tmp_path, monkeypatch):
    monkeypatch.setattr(MatryoshkaTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs are visible to one process: .* torchrun --nproc_per_node 2"):
        runner(tiny_raw_model_path, training_file, tmp_path / "out")


def test_an_output_directory_can_be_protected(tiny_raw_model_path, training_file, tmp_path):
    (tmp_path / "out").mkdir()
    runner(tiny_raw_model_path, training_file, tmp_path / "out", overwrite_output_dir=False)
    (tmp_path / "out" / "model").touch()
    with pytest.raises(ValueError, match="out is not empty, and overwrite_output_dir is False"):
        runner(tiny_raw_model_path, training_file, tmp_path / "out", overwrite_output_dir=False)


def test_a_run_is_refused_while_another_writes_to_its_directory(tiny_raw_model_path, training_file, tmp_path):
    run = runner(tiny_raw_model_path, training_file, tmp_path / "out", max_steps=1)
    with locked(tmp_path / "out"), pytest.raises(ValueError, match="another run writes to output_dir"):
        run.run()
    run.run()


def test_insisting_on_a_kind_of_checkpoint(tiny_raw_model_path, training_file, tmp_path):
    with pytest.raises(ValueError, match=r"from_raw=False, but .* is a raw checkpoint"):
        runner(tiny_raw_model_path, training_file, tmp_path / "out", {"model_type": "from_finetuned_model"})


def test_teacher_methods_need_scores_and_others_refuse_to_ignore_them(tiny_raw_model_path, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]}))
    with pytest.raises(ValueError, match=r"plain\.jsonl, line 1: pos_scores is missing.*--train_method normal"):
        runner(tiny_raw_model_path, path, tmp_path / "out", train_method="distill_fix_layer_teacher")
    with pytest.raises(ValueError, match=r"knowledge_distillation=True, but train_method normal uses no"):
        MatryoshkaRunner(
            MatryoshkaModelArguments(model_name_or_path=str(tiny_raw_model_path)),
            MatryoshkaDataArguments(train_data=[str(path)], knowledge_distillation=True),
            MatryoshkaTrainingArguments(output_dir=str(tmp_path / "out"), train_method="normal", use_cpu=True),
        )
    with pytest.raises(ValueError, match=r"knowledge_distillation=False, but train_method distill uses teacher scores"):
        runner(
            tiny_raw_model_path, path, tmp_path / "out", {}, {"knowledge_distillation": False}, train_method="distill"
        )
    with pytest.raises(FileNotFoundError, match="no training data at"):
        runner(tiny_raw_model_path, tmp_path / "missing.jsonl", tmp_path / "out")


WIDTH = ("--compress_layers", "2", "4", "--compress_ratios", "1", "2", "4")


def history(output_dir, step=12):
    state = json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def trained_weights(output_dir):
    return load_file(output_dir / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_line_of_the_reference(processes, tiny_raw_model_path, training_file, tmp_path):
    output_dir = tmp_path / "out"
    options = (*WIDTH, "--save_steps", "100", "--save_total_limit", "50", "--gradient_checkpointing")
    run_command(command_line(tiny_raw_model_path, training_file, output_dir, processes, *options))
    losses = history(output_dir)
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])
    loaded = MatryoshkaReranker(str(output_dir), dtype="float32", devices="cpu")
    assert scores_of(loaded).isfinite().all()


@pytest.mark.slow
def test_a_run_warns_of_nothing(tiny_raw_model_path, training_file, tmp_path):
    command = command_line(tiny_raw_model_path, training_file, tmp_path / "out", 2, *WIDTH, "--load_in_4bit", "True")
    at = command.index("--ddp_find_unused_parameters")
    result = run_command(command[:at] + command[at + 2 :])
    assert [
        line for line in result.stderr.splitlines() if re.search(r"[Ww]arning:|WARNING|[Ff]ailed|deprecated", line)
    ] == []


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_batch_of_both(tiny_raw_model_path, training_file, tmp_path):
    losses = []
    for processes, batch in ((1, 4), (2, 2)):
        output_dir = tmp_path / str(processes)
        options = ("--lora_dropout", "0", "--compress_ratios", "1", "--per_device_train_batch_size", str(batch))
        run_command(command_line(tiny_raw_model_path, training_file, output_dir, processes, *options))
        losses.append(history(output_dir))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights_when_it_is_resumed(tiny_raw_model_path, training_file, tmp_path):
    # 4 steps an epoch: checkpoint 6 lies within one
    options = (*WIDTH, "--save_steps", "3", "--save_total_limit", "2", "--per_device_train_batch_size", "2")

    def command(output_dir):
        return command_line(tiny_raw_model_path, training_file, output_dir, 1, *options, "--resume_from_checkpoint")

    run_command(command(tmp_path / "whole"))
    output_dir = tmp_path / "killed"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command(output_dir),
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 200
        while not list(output_dir.glob("checkpoint-6*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        # Workers have process groups of their own. The launcher is stopped first, so that it starts no others.
        launcher = psutil.Process(process.pid)
        launcher.suspend()
        killed = [*launcher.children(recursive=True), launcher]
        for each in killed:
            each.kill()
        process.wait()
        psutil.wait_procs(killed, timeout=60)
        assert len(killed) > 1 and not any(each.is_running() for each in killed)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    assert not (output_dir / "adapter_model.safetensors").exists()
    run_command(command(output_dir))
    expected, resumed = trained_weights(tmp_path / "whole"), trained_weights(output_dir)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_flag_embeddings_argument_classes_drive_it(tiny_raw_model_path, training_file, tmp_path, caplog):
    run = MatryoshkaRunner(
        AbsRerankerModelArguments(model_name_or_path=str(tiny_raw_model_path)),
        AbsRerankerDataArguments(
            train_data=[str(training_file)],
            train_group_size=4,
            knowledge_distillation=True,
            cache_path=str(tmp_path / "cache"),
        ),
        AbsRerankerTrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, save_strategy="no"
        ),
    )
    assert run.training_args.train_method == "distill_fix_layer_teacher"
    assert "learning_rate: 5e-05 becomes 0.0002" in caplog.text
    assert Template.load(run.model.config.template) == Template()
    run.run()
    assert len(MatryoshkaReranker(str(tmp_path / "out"), devices="cpu").compute_score(PAIRS)) == 2


def test_the_template_is_saved_with_what_was_trained(tiny_raw_model_path, training_file, tmp_path):
    (tmp_path / "template.json").write_text('{"prompt": "Yes?", "head_tokens": ["Yes", "no"]}')
    words = {"query_instruction_for_rerank": "Q: ", "passage_instruction_format": "[{}{}]", "sep_token": " "}
    model_args = {"template": str(tmp_path / "template.json"), "start_layer": 2}
    run = runner(tiny_raw_model_path, training_file, tmp_path / "out", model_args, words)
    expected = Template(
        query_instruction="Q: ",
        between=" ",
        passage_format="[{}{}]",
        behind=" ",
        prompt="Yes?",
        head_tokens=("Yes", "no"),
    )
    assert Template.load(run.model.config.template) == expected
    sequence = run.train_dataset[0][0][0].input_ids
    text = run.tokenizer.decode(sequence).removeprefix("<s>").strip()
    row = json.loads(training_file.read_text().splitlines()[0])
    assert text == f"Q: {row['query']} [B: {row['pos'][0]}] Yes?"
    run.run()
    reranker = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    assert (reranker.prompt, reranker.query_instruction_for_rerank) == ("Yes?", "Q: ")
    assert Template.load(reranker.config.template) == expected
    tokenizer = run.train_dataset.pair_tokenizer
    lengths = tokenizer.lengths_within(None, 512, expected)
    (pair,) = tokenizer.build([(row["query"], row["pos"][0])], *lengths, expected)
    assert reranker.count_tokens(row["query"], row["pos"])[0] == pair.query_length
    assert pair.input_ids.tolist() == sequence.tolist()


def test_arguments_of_another_kind_that_have_no_meaning_here_are_refused(training_file, tmp_path):
    @dataclass
    class Others(AbsRerankerTrainingArguments):
        temperature: float = 1.0

    arguments = Others(output_dir=str(tmp_path), report_to="none", use_cpu=True, temperature=0.5)
    with pytest.raises(ValueError, match=r"Others sets \{'temperature': 0.5\}"):
        MatryoshkaRunner(
            AbsRerankerModelArguments(model_name_or_path="none"),
            AbsRerankerDataArguments(train_data=[str(training_file)]),
            arguments,
        )


def test_the_log_says_what_the_checkpoint_says_of_itself(tiny_raw_model_path, training_file, tmp_path, caplog):
    with caplog.at_level("INFO"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of scores that mean nothing: training gives them a meaning
        runner(tiny_raw_model_path, training_file, tmp_path / "out")
    (line,) = (record.message for record in caplog.records if str(tiny_raw_model_path) + ":" in record.message)
    assert "mistral, causal language model" in line and "template cost_wise [assumed]" in line
