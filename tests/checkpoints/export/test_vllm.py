"""What vLLM reads of an exported exit. The names were read in the source of vLLM 0.33.0; where an environment has vLLM
for the CPU, it scores, too."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from jinja2 import Environment, meta
from safetensors import safe_open
from transformers import AutoTokenizer

from tests.batches import close
from tests.exports import load, mixed_pairs, write_reranker
from tests.pages import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = "Judge the Document"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PAIRS = [(query, document) for query, document in mixed_pairs(24) if document]

ARCHITECTURES = {  # XForSequenceClassification is made of XForCausalLM in vllm/model_executor/models/registry.py
    *("Arcee", "Exaone4", "Gemma", "Gemma2", "Glm4", "HunYuanDenseV1", "Llama", "Ministral3", "Mistral", "Olmo2"),
    *("Phi3", "Qwen2", "Qwen3", "SeedOss", "SmolLM3"),
}
TENSORS = {  # of llama.py, whose load_weights stacks q, k and v, and gate and up; qwen3.py has q_norm and k_norm, too
    "model.embed_tokens.weight",
    "model.norm.weight",
    *(
        f"model.layers.{{}}.{name}.weight"
        for name in (
            *("input_layernorm", "post_attention_layernorm"),
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    ),
    "score.weight",  # as_seq_cls_model in models/adapters.py: a linear layer without bias, of num_labels rows
}
OTHER_HEADS = ("classifier_from_token", "method", "is_original_qwen3_reranker")
"""Fields of config.json with which models/adapters.py and models/config.py make another head."""
ROLES = [{"role": "query", "content": "wing?"}, {"role": "document", "content": "lift\n"}]
"""What get_score_prompt of entrypoints/pooling/scoring/io_processor.py renders, without add_generation_prompt; an
instruction is a variable, see ScoringRequestMixin in protocol.py there."""
RESERVED = {"tools", "tokenize"}
"""With these among the saved variables, CrossEncoderIOProcessor refuses to start without --chat-template."""
POOLING_MODULES = ("Pooling", "Normalize", "Dense")
"""Modules of sentence-transformers with which transformers_utils/config.py replaces the pooling of the last token."""


def exported(folder, name="qwen3", template="mxbai-v2", values=None, **options):
    """A re-ranker and the directory that its third exit is exported to."""
    reranker = load(write_reranker(name, folder, template, **values or {}), **options)
    reranker.export(str(folder / "out"), 3, format="transformers", allow_uncapped=name == "gemma2")
    return reranker, folder / "out"


def read(directory, name):
    return json.loads((directory / name).read_text())


@pytest.mark.parametrize(("name", "more"), [("mistral", ()), ("qwen3", ("q_norm", "k_norm"))])
def test_architecture_tensors_and_head(name, more, tmp_path):
    reranker, directory = exported(tmp_path, name)
    config = read(directory, "config.json")
    (architecture,) = config["architectures"]
    assert architecture.removesuffix("ForSequenceClassification") in ARCHITECTURES
    assert not config.keys() & {*OTHER_HEADS, "problem_type"}
    tensors = TENSORS | {f"model.layers.{{}}.self_attn.{part}.weight" for part in more}
    expected = {tensor.format(layer) for tensor in tensors for layer in range(3)}
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert set(file.keys()) == expected
        assert file.get_slice("score.weight").get_shape() == [1, reranker.config.hidden_size]
    assert config["id2label"] == {"0": "LABEL_0"}  # num_labels of transformers


@pytest.mark.parametrize(("activation", "name"), [("Sigmoid", "activation"), ("Identity", "linear")])
def test_activation_is_a_module_of_torch(activation, name, tmp_path):
    path = write_reranker("qwen3", tmp_path, "mxbai-v2")
    wanted = f"torch.nn.modules.{name}.{activation}"  # get_act_fn in layers/pooler/activations.py allows no other
    (path / "config_sentence_transformers.json").write_text(json.dumps({"activation_fn": wanted}))
    load(path).export(str(tmp_path / "out"), 3, format="transformers")
    assert read(tmp_path / "out", "config.json")["sentence_transformers"] == {"activation_fn": wanted}


def test_the_last_token_is_pooled(tmp_path):
    _, directory = exported(tmp_path)
    (module,) = read(directory, "modules.json")
    assert module["path"] == "" and not module["type"].endswith(POOLING_MODULES)
    assert read(directory, "sentence_bert_config.json")["transformer_task"] == "sequence-classification"
    assert "message" in read(directory, "sentence_bert_config.json")["modality_config"]


def test_gemma2_ties_its_words(tmp_path):
    _, directory = exported(tmp_path, "gemma2")
    config = read(directory, "config.json")
    assert config["tie_word_embeddings"] is True and config["final_logit_softcapping"] is None


def test_the_score_template_renders_the_tokens(tmp_path):
    reranker, directory = exported(tmp_path)
    template = (directory / "chat_template.jinja").read_text()
    # vLLM passes only variables on that it finds in the template
    assert {"instruction", "instruct"} <= meta.find_undeclared_variables(Environment(autoescape=True).parse(template))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for options in ({}, {"instruction": TASK}, {"instruct": TASK}):
        rendered = tokenizer.apply_chat_template(
            ROLES, chat_template=template, tools=None, tokenize=False, add_generation_prompt=False, **options
        )
        (built,) = reranker.tokenize([("wing?", "lift\n")], instruction=TASK if options else None)
        assert tokenizer(rendered, add_special_tokens=True)["input_ids"] == built.input_ids.tolist()
    assert "processing_kwargs" not in read(directory, "sentence_bert_config.json")


def test_a_default_instruction_asks_for_the_template_on_the_command_line(tmp_path):
    """Saved variables would blank the instruction, which vLLM takes from the template alone."""
    reranker, directory = exported(tmp_path, instruction=TASK)
    saved = read(directory, "sentence_bert_config.json")["processing_kwargs"]["chat_template"]
    assert saved["instruction"] == "" and saved.keys() & RESERVED
    tokenizer = AutoTokenizer.from_pretrained(directory)
    (built,) = reranker.tokenize([("wing?", "lift\n")])
    assert tokenizer(tokenizer.apply_chat_template(ROLES, tokenize=False))["input_ids"] == built.input_ids.tolist()


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="make .venv-vllm/.installed makes the environment with vLLM")
def test_vllm_gives_the_scores_of_the_exit(tmp_path):
    jobs, expected = [], []
    for name, values in (("qwen3", {"head_dim": 32}), ("mistral", {"head_dim": 32})):
        (tmp_path / name).mkdir()
        reranker, directory = exported(tmp_path / name, name, values=values, instruction=TASK)
        jobs.append([str(directory), PAIRS])
        expected.append(reranker.compute_score(PAIRS, cutoff_layers=3))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_scores.py")
    arguments = [PYTHON, "-I", script, tmp_path / "jobs.json", tmp_path / "scores.json"]
    run = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    for found, scores in zip(json.loads((tmp_path / "scores.json").read_text()), expected, strict=True):
        close(torch.tensor(found), torch.tensor(scores), 1e-4)
