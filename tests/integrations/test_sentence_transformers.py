"""Our checkpoints in sentence-transformers' CrossEncoder."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.cross_encoder import load_cross_encoder

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
    for refused, message in (
        ({"num_labels": 3}, "num_labels=3, but a re-ranker has one score"),
        ({"model_kwargs": {"device_map": "auto"}}, r"model_kwargs=\{'device_map': 'auto'\}, processor_kwargs=\{\}"),
        ({"model_kwargs": {"dtype": "auto"}}, "'auto'}: name a dtype"),
        (
            {"model_kwargs": {"dtype": "float32", "torch_dtype": "float16"}},
            r"model_kwargs=\{'torch_dtype': 'float16'\}",
        ),
        ({"processor_kwargs": {"padding": 1}}, r"processor_kwargs=\{'padding': 1\}"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, device="cpu", **refused)
