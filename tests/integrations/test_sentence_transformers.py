"""Our checkpoints in sentence-transformers' CrossEncoder."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import (
    CrossEncoderModelCardData,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.cross_encoder import load_cross_encoder
from flagembedding_matryoshka.text.templates import Template

PAIRS = [
    ("how does a wing lift", "air flows over the upper side"),
    ("heat", "a wing"),
    ("heat", "the flux of heat, air"),
]
OPTIONS = [
    {},
    {"cutoff_layers": [3]},
    {"cutoff_layers": [5], "compress_layers": [2], "compress_ratio": 2},
    {"compress_layers": [2, 4], "compress_ratio": 4},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_scores_are_those_of_the_reranker(options, tiny_layerwise_path):
    expected = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu").compute_score(
        PAIRS, **options
    )
    model = load_cross_encoder(str(tiny_layerwise_path), device="cpu")
    assert model.predict(PAIRS, **options).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def cross_encoder(tiny_layerwise_path):
    """Tests leave it as it is."""
    return load_cross_encoder(tiny_layerwise_path, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules": []}, r"\['modules'\] have no effect here, because the checkpoint has its own"),
        ({"classifier_dropout": 0.1}, r"\['classifier_dropout'\] have no effect"),
        ({"max_lenght": 3}, "unexpected keyword argument 'max_lenght'"),
    ],
)
def test_what_would_do_nothing_is_refused(arguments, message, tiny_layerwise_path):
    with pytest.raises(TypeError, match=message):
        load_cross_encoder(str(tiny_layerwise_path), device="cpu", **arguments)


@pytest.mark.parametrize("call", ["predict", "rank"])
@pytest.mark.parametrize("wrong", [{"cutof_layers": [3]}, {"processing_kwargs": {"text": {}}}, {"task": "rerank"}])
def test_no_keyword_of_a_call_is_ignored(call, wrong, cross_encoder):
    given = (PAIRS,) if call == "predict" else ("heat", ["air"])
    message = rf"unknown arguments \['{next(iter(wrong))}'\]: allowed are CrossEncoder's and \['compress_layers', 'c"
    with pytest.raises(TypeError, match=message):
        getattr(cross_encoder, call)(*given, **wrong)


def test_pairs_of_any_iterable(cross_encoder):
    expected = cross_encoder.predict(PAIRS).tolist()
    for pairs in (iter(PAIRS), np.array(PAIRS), tuple(map(list, PAIRS))):
        assert cross_encoder.predict(pairs).tolist() == pytest.approx(expected, abs=1e-5)
    assert cross_encoder.predict(PAIRS[0]) == pytest.approx(expected[0], abs=1e-5)
    with pytest.raises(TypeError, match="pair 0 must be a query and a passage"):
        cross_encoder.predict(pandas.DataFrame(PAIRS, columns=["query", "passage"]))
    with pytest.raises(ValueError, match="top_k is 0"):
        cross_encoder.rank("heat", ["air"], 0)


@pytest.mark.parametrize("load", [load_cross_encoder, partial(CrossEncoder, trust_remote_code=True)])
def test_prompts_are_instructions_and_are_saved(load, tiny_layerwise_path, tmp_path):
    MatryoshkaReranker(
        str(tiny_layerwise_path), dtype="float32", devices="cpu", template=Template.load("mxbai-v2").to_json()
    ).export(str(tmp_path / "mxbai"), cutoff_layers=[3, 6])
    prompts = {"heat": "Is it about heat?", "none": ""}
    model = load_cross_encoder(str(tmp_path / "mxbai"), device="cpu", prompts=prompts, default_prompt_name="heat")
    reranker = MatryoshkaReranker(str(tmp_path / "mxbai"), dtype="float32", devices="cpu", instruction=prompts["heat"])
    expected, without = reranker.compute_score(PAIRS), reranker.compute_score(PAIRS, instruction="")
    assert expected != pytest.approx(without, abs=1e-3)
    assert model.predict(PAIRS).tolist() == pytest.approx(expected, abs=1e-5)
    assert model.predict(PAIRS, prompt="").tolist() == pytest.approx(without, abs=1e-5)
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    again = load(str(tmp_path / "saved"), device="cpu")
    assert (again.prompts, again.default_prompt_name) == (prompts, "heat")
    assert again.predict(PAIRS).tolist() == pytest.approx(expected, abs=1e-5)
    found = again.rank(*PAIRS[1][:1], [PAIRS[1][1]], prompt_name="none")
    assert found[0]["score"] == pytest.approx(without[1], abs=1e-5)
    same = MatryoshkaReranker(str(tmp_path / "saved"), dtype="float32", devices="cpu")
    assert same.description.instruction.value == prompts["heat"]
    assert same.compute_score(PAIRS) == pytest.approx(expected, abs=1e-5)


def test_deprecated_names_are_taken_as_sentence_transformers_takes_them(cross_encoder):
    assert cross_encoder.predict(sentences=PAIRS).tolist() == cross_encoder.predict(PAIRS).tolist()
    documents = ["a wing", "the flux of heat, air"]
    expected = cross_encoder.rank("heat", documents)
    for name in ("convert_to_tensor", "convert_to_numpy", "apply_softmax"):
        assert cross_encoder.rank("heat", documents, **{name: True}) == expected
    sigmoid = cross_encoder.rank("heat", documents, activation_fct=torch.nn.Sigmoid())
    assert all(0 < hit["score"] < 1 for hit in sigmoid)


def test_a_template_without_a_place_refuses_a_prompt(cross_encoder):
    with pytest.raises(ValueError, match=r"no place for the instruction 'Is B about heat\?'.*qwen3-reranker, zerank"):
        cross_encoder.predict(PAIRS, prompt="Is B about heat?")


def blocks(card):
    return [block.removeprefix("python\n") for block in card.split("```")[1::2] if block.startswith("python\n")]


@pytest.mark.parametrize("load", [load_cross_encoder, partial(CrossEncoder, trust_remote_code=True)])
def test_the_model_card_says_how_the_model_is_used(load, tiny_layerwise_path, tmp_path):
    exported, saved = str(tmp_path / "exported"), str(tmp_path / "saved")
    MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu").export(exported, cutoff_layers=[3, 5])
    data = CrossEncoderModelCardData(language="en", license="mit", local_files_only=True)
    model = load(exported, device="cpu", model_card_data=data)
    model.model_card_data.model_id = "somebody/reranker"
    model.save_pretrained(saved)
    card = Path(saved, "README.md").read_text()
    header = ModelCard(card).data
    assert (header.language, header.license, header.pipeline_tag) == (["en"], "mit", "text-ranking")
    assert {"sentence-transformers", "cross-encoder", "reranker", "matryoshka"} <= set(header.tags)
    assert "`mistral` decoder with\n5 layers and a hidden size of 32" in card and "| 3, 5 | 5 |" in card
    assert exported not in card and str(tiny_layerwise_path) not in card
    # What it shows runs: of the pushed model, here that directory.
    names = {}
    for block in blocks(card):
        exec(block.replace("somebody/reranker", saved), names)
    assert len(names["scores"]) == len(names["pairs"])
    assert names["reranker"].config.exit_layers == [3, 5]


def test_weights_that_are_no_safetensors_are_not_written(cross_encoder, tmp_path):
    with pytest.raises(ValueError, match="weights are written in safetensors only"):
        cross_encoder.save_pretrained(str(tmp_path), safe_serialization=False)


@pytest.mark.parametrize("load", [load_cross_encoder, partial(CrossEncoder, trust_remote_code=True)])
def test_what_is_pushed_to_the_hub_is_found_there(load, hub, cross_encoder):
    expected = cross_encoder.predict(PAIRS).tolist()
    for revision, length in (("v1", 40), ("v2", 16)):
        model = load_cross_encoder(cross_encoder[0].base, device="cpu", local_files_only=True, max_length=length)
        url = model.push_to_hub("somebody/reranker", token="hf_secret", revision=revision, exist_ok=True)
        assert url.startswith(f"{hub.url}/somebody/reranker/commit/")
    files = hub.models["somebody/reranker"]["v1"]
    assert {"model.safetensors", "tokenizer.json", "modules.json", "README.md"} <= files.keys()
    assert b'load_cross_encoder("somebody/reranker")' in files["README.md"]
    hub.asked.clear()
    again = load("somebody/reranker", revision="v2", token="hf_secret", device="cpu")
    assert {token for path, token in hub.asked if "/resolve/" in path} == {"Bearer hf_secret"}
    assert again.max_seq_length == 16
    assert again.model_card_data.base_model == "somebody/reranker"
    for place in ({"revision": "v1", "token": "hf_secret"}, {"revision": "v1", "local_files_only": True}):
        assert load("somebody/reranker", device="cpu", **place).predict(PAIRS).tolist() == pytest.approx(
            expected, abs=1e-5
        )


def test_several_cutoff_layers_are_refused(tiny_layerwise_path):
    model = load_cross_encoder(str(tiny_layerwise_path), device="cpu")
    with pytest.raises(ValueError, match=r"cutoff_layers=\[3, 4\]"):
        model.predict(PAIRS, cutoff_layers=[3, 4])


def test_what_is_saved_loads_again(tiny_layerwise_path, tmp_path):
    model = load_cross_encoder(str(tiny_layerwise_path), device="cpu")
    model[0].max_length = 40
    expected = model.predict(PAIRS).tolist()
    model.save_pretrained(str(tmp_path), create_model_card=False)

    loaded = CrossEncoder(str(tmp_path), device="cpu", trust_remote_code=True, local_files_only=True)

    assert loaded[0].max_length == 40
    assert loaded.predict(PAIRS).tolist() == pytest.approx(expected, abs=1e-5)
    reranker = MatryoshkaReranker(str(tmp_path), dtype="float32", devices="cpu", max_length=40)
    assert reranker.compute_score(PAIRS) == pytest.approx(expected, abs=1e-5)


LONG = [*PAIRS, ("a wing " * 20, "a flow of energy " * 40)]
WORDS = {"query_instruction": "Q: ", "passage_instruction": "D: ", "prompt": "Is it?"}


@pytest.mark.parametrize("load", [load_cross_encoder, partial(CrossEncoder, trust_remote_code=True)])
def test_words_and_lengths_of_a_cross_encoder_are_those_of_the_reranker(load, tiny_layerwise_path, tmp_path):
    model = load_cross_encoder(str(tiny_layerwise_path), device="cpu")
    plain = model.predict(LONG).tolist()
    for name, value in (WORDS | {"query_max_length": 12, "max_length": 40}).items():
        setattr(model[0], name, value)
    expected = model.predict(LONG).tolist()
    assert expected != pytest.approx(plain, abs=1e-3)
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    reranker = MatryoshkaReranker(str(tmp_path / "saved"), dtype="float32", devices="cpu")
    assert reranker.compute_score(LONG) == pytest.approx(expected, abs=1e-5)
    assert (reranker.query_max_length, reranker.max_length) == (12, 40)
    reranker.export(str(tmp_path / "exported"))
    for place in ("saved", "exported"):
        assert load(str(tmp_path / place), device="cpu").predict(LONG).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("load", [load_cross_encoder, partial(CrossEncoder, trust_remote_code=True)])
def test_words_and_lengths_of_a_reranker_are_those_of_the_cross_encoder(load, tiny_layerwise_path, tmp_path):
    reranker = MatryoshkaReranker(
        str(tiny_layerwise_path),
        dtype="float32",
        devices="cpu",
        template="mxbai-v2",
        instruction="Is it about heat?",
        prompt="Is it?",
        passage_instruction_for_rerank="D: ",
        query_instruction_format="{}query {}:",
        query_max_length=12,
        max_length=40,
    )
    expected, without = reranker.compute_score(LONG), reranker.compute_score(LONG, instruction="")
    assert expected != pytest.approx(without, abs=1e-3)
    reranker.export(str(tmp_path / "exported"))
    model = load(str(tmp_path / "exported"), device="cpu")
    assert model.predict(LONG).tolist() == pytest.approx(expected, abs=1e-5)
    assert model.predict(LONG, prompt="").tolist() == pytest.approx(without, abs=1e-5)
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    for place in ("exported", "saved"):
        again = MatryoshkaReranker(str(tmp_path / place), dtype="float32", devices="cpu")
        assert again.compute_score(LONG) == pytest.approx(expected, abs=1e-5)
        assert again.compute_score(LONG, instruction="") == pytest.approx(without, abs=1e-5)
        assert (again.query_max_length, again.max_length) == (12, 40)


def test_an_empty_default_prompt_is_no_instruction(tiny_layerwise_path, tmp_path):
    MatryoshkaReranker(
        str(tiny_layerwise_path), devices="cpu", template="mxbai-v2", instruction="Is it about heat?", dtype="float32"
    ).export(str(tmp_path / "exported"))
    model = load_cross_encoder(
        str(tmp_path / "exported"), device="cpu", prompts={"none": ""}, default_prompt_name="none"
    )
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    reranker = MatryoshkaReranker(str(tmp_path / "saved"), dtype="float32", devices="cpu")
    assert reranker.compute_score(PAIRS) == pytest.approx(model.predict(PAIRS).tolist(), abs=1e-5)
    assert reranker.compute_score(PAIRS) != pytest.approx(model.predict(PAIRS, prompt="Is it about heat?"), abs=1e-3)


@pytest.mark.slow
def test_the_trainer_trains_it(tiny_layerwise_path, tmp_path):
    model = load_cross_encoder(str(tiny_layerwise_path), device="cpu")
    rows = {"query": ["heat", "wing"] * 4, "passage": ["the heat", "a side"] * 4, "label": [1.0, 0.0] * 4}
    args = CrossEncoderTrainingArguments(
        output_dir=str(tmp_path), max_steps=8, learning_rate=1e-3, report_to="none", use_cpu=True, logging_steps=1
    )
    trainer = CrossEncoderTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict(rows), loss=BinaryCrossEntropyLoss(model)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_the_reranking_evaluator_runs(tiny_layerwise_path):
    model = load_cross_encoder(str(tiny_layerwise_path), device="cpu")
    samples = [{"query": "heat", "positive": ["the heat"], "negative": ["a wing", "air"]}]
    metrics = CrossEncoderRerankingEvaluator(samples, show_progress_bar=False, write_csv=False)(model)
    first = model.rank("heat", ["the heat", "a wing", "air"])
    rank = 1 + [hit["corpus_id"] for hit in first].index(0)
    assert metrics["mrr@10"] == pytest.approx(1 / rank)


@pytest.mark.parametrize("options", OPTIONS)
def test_rank_takes_depth_and_width(options, tiny_layerwise_path):
    documents = [passage for _, passage in PAIRS]
    expected = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu").rank(
        "heat", documents, top_k=2, return_documents=True, **options
    )
    found = load_cross_encoder(str(tiny_layerwise_path), device="cpu").rank(
        "heat", documents, top_k=2, return_documents=True, **options
    )
    assert [(hit["corpus_id"], hit["text"]) for hit in found] == [(hit["corpus_id"], hit["text"]) for hit in expected]
    assert [hit["score"] for hit in found] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)


DOCUMENTS = ["air flows over the upper side", "a wing", "the flux of heat, air", "heat", "a wing"]
FIRST = [1.0, 9.0, None, 3.0, 8.0]


@pytest.mark.parametrize("options", [*OPTIONS, {"fusion": 0}])
@pytest.mark.parametrize("given", [{"first_stage_scores": FIRST}, {"first_stage": "order"}])
def test_rank_fuses_as_the_reranker(options, given, cross_encoder, tiny_layerwise_path):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
    options = {"fusion": 2.0, "top_k": 4, "return_documents": True} | options | given
    expected, found = (model.rank("heat", DOCUMENTS, **options) for model in (reranker, cross_encoder))
    assert [hit["corpus_id"] for hit in found] == [hit["corpus_id"] for hit in expected]
    for hit, other in zip(found, expected, strict=True):
        assert hit.keys() == other.keys()
        assert hit.pop("text") == other.pop("text")
        assert hit == pytest.approx(other, abs=1e-4)
    scores = {hit["corpus_id"]: hit["fused_score"] for hit in expected}
    activated = cross_encoder.rank("heat", iter(DOCUMENTS), activation_fn=torch.nn.Sigmoid(), **options)
    assert {hit["corpus_id"]: pytest.approx(hit["fused_score"], abs=1e-4) for hit in activated} == scores
    assert all(0 < hit["score"] < 1 for hit in activated)
    assert cross_encoder.rank("heat", [], first_stage_scores=[], fusion=1) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"first_stage_scores": FIRST}, ValueError, r"need a weight: give fusion=, a number"),
        ({"first_stage": "order"}, ValueError, r"need a weight: give fusion=, a number"),
        ({"fusion": 0.5}, ValueError, r"fusion=0\.5 needs the first stage's scores"),
        ({"first_stage": "order", "fusion": "auto"}, ValueError, "fusion='auto': a CrossEncoder has no plan"),
        ({"first_stage": "order", "fusion": -1}, ValueError, "fusion is -1, but must be finite and at least 0"),
        ({"first_stage": "order", "fusion": "a"}, TypeError, "fusion must be a number, .* got 'a'"),
        ({"first_stage": "none", "fusion": 1}, ValueError, "first_stage is 'none', but must be 'order' or None"),
        ({"first_stage_scores": FIRST, "first_stage": "order", "fusion": 1}, ValueError, "give one of them"),
        ({"first_stage_scores": FIRST[1:], "fusion": 1}, ValueError, "4 first_stage_scores, but 5 candidates"),
    ],
)
def test_invalid_fusion_is_refused_before_computation(cross_encoder, options, error, message, monkeypatch):
    monkeypatch.setattr(type(cross_encoder), "predict", lambda *_, **__: pytest.fail("something is computed"))
    with pytest.raises(error, match=message):
        cross_encoder.rank("heat", DOCUMENTS, **options)


@pytest.mark.parametrize(
    "options", [{"fusion": 0.5}, {"first_stage": "order"}, {"first_stage_scores": [1.0, 2.0, 3.0]}]
)
def test_predict_refuses_arguments_of_a_ranking(cross_encoder, options):
    (name,) = options
    with pytest.raises(TypeError, match=f"^{name} is an argument of rank"):
        cross_encoder.predict(PAIRS, **options)
    assert len(cross_encoder.predict(PAIRS, **{name: None})) == len(PAIRS)


def test_what_is_exported_loads_by_its_path(tiny_layerwise_path, tmp_path):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
    reranker.export(str(tmp_path), cutoff_layers=[3])
    model = CrossEncoder(str(tmp_path), device="cpu", trust_remote_code=True, local_files_only=True)
    assert model.predict(PAIRS).tolist() == pytest.approx(reranker.compute_score(PAIRS, cutoff_layers=[3]), abs=1e-5)


def test_ranks_are_by_scores_that_a_sigmoid_makes_equal(tiny_layerwise_path):
    model = load_cross_encoder(str(tiny_layerwise_path), device="cpu", activation_fn=torch.nn.Sigmoid())
    with torch.no_grad():
        for head in model[0].model.lm_head:
            head.linear_head.weight *= 300
    documents = [" ".join(["wing", "flow", "heat"][: 1 + number % 3] * (1 + number)) for number in range(9)]
    raw = model.rank("heat", documents, activation_fn=torch.nn.Identity())
    found = model.rank("heat", iter(documents), return_documents=True)
    assert len({hit["score"] for hit in found}) < len({hit["score"] for hit in raw}) == 9
    assert [hit["corpus_id"] for hit in found] == [hit["corpus_id"] for hit in raw]
    assert all(0 <= hit["score"] <= 1 and hit["text"] == documents[hit["corpus_id"]] for hit in found)
    assert model.rank("heat", []) == []


@pytest.mark.parametrize("load", [load_cross_encoder, partial(CrossEncoder, trust_remote_code=True)])
def test_the_arguments_of_a_cross_encoder_do_what_they_say(load, tiny_layerwise_path, tmp_path):
    path = str(tmp_path)
    MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu").export(path)
    long = [("heat", "a flow of energy " * 40)]
    whole, cut = (load(path, device="cpu", max_length=length, num_labels=1) for length in (256, 16))
    assert (whole.max_length, cut.max_length) == (256, 16)
    expected = MatryoshkaReranker(path, dtype="float32", devices="cpu", max_length=16).compute_score(long)
    assert cut.predict(long).tolist() == pytest.approx(expected, abs=1e-5)
    assert whole.predict(long).tolist() != pytest.approx(expected, abs=1e-5)
    whole.max_length = 16
    assert whole.predict(long).tolist() == pytest.approx(expected, abs=1e-5)
    half = load(path, device="cpu", model_kwargs={"dtype": "bfloat16"}, local_files_only=True)
    assert {value.dtype for name, value in half.named_parameters() if "linear_head" not in name} == {torch.bfloat16}
    half.save_pretrained(path, create_model_card=False)
    for dtype, expected in (("auto", torch.bfloat16), (None, torch.float32)):
        stored = load(path, device="cpu", model_kwargs={"dtype": dtype}, cache_folder=str(tmp_path), token=False)
        assert stored[0].model.dtype == expected
    for refused, message in (
        ({"num_labels": 3}, "num_labels=3, but a re-ranker has one score"),
        ({"model_kwargs": {"device_map": "auto"}}, r"model_kwargs=\{'device_map': 'auto'\}, processor_kwargs=\{\}"),
        ({"tokenizer_kwargs": {"padding": 1}}, r"processor_kwargs=\{'padding': 1\}"),
        ({"backend": "onnx"}, "backend='onnx', but a MatryoshkaModule has the backend 'torch' only"),
        ({"revision": "v1"}, "revision='v1', but .* is a path"),
        (
            {"model_kwargs": {"dtype": "float32", "torch_dtype": "float16"}},
            r"model_kwargs=\{'torch_dtype': 'float16'\}",
        ),
        ({"processor_kwargs": {"padding": 1}}, r"processor_kwargs=\{'padding': 1\}"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, device="cpu", **refused)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokenizer_args": {}, "processor_kwargs": {}}, "tokenizer_args and processor_kwargs are one argument"),
        ({"tokenizer_args": {}, "tokenizer_kwargs": {}}, "tokenizer_kwargs and tokenizer_args are one argument"),
        ({"max_length": 8, "tokenizer_args": {"model_max_length": 9}}, "max_length=8 and processor_kwargs's"),
    ],
)
def test_an_argument_is_given_once(given, said, tiny_layerwise_path):
    with pytest.raises(TypeError, match=said):
        load_cross_encoder(str(tiny_layerwise_path), **given)
