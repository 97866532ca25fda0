import json

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation.candidates import from_bm25
from flagembedding_matryoshka.evaluation.measure import measure_settings
from flagembedding_matryoshka.evaluation.results import Store, conditions, slug
from flagembedding_matryoshka.finetune.beir import parse_settings
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.collections import read_collection
from tests.collection import CORPUS, write_collection
from tests.finetune.runs import runner

pytest.importorskip("bm25s")
pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = [
    {"cutoff_layers": 5},
    {"cutoff_layers": 6, "compress_layers": [2], "compress_ratio": 2},
    {"cascade": {"5": 0.5}},
]


@pytest.fixture
def collection(tmp_path):
    judgements = (("q1", "p2", 1), ("q1", "p5", 2), ("q3", "p6", 1))
    return write_collection(tmp_path / "wings", judgements=judgements, split="test")


def run_with(collection, tiny_raw_model_path, training_file, tmp_path, data_args=(), **options):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2} | options
    data_args = {"eval_beir": [str(collection)], "eval_settings": list(map(json.dumps, SETTINGS)), **dict(data_args)}
    return runner(tiny_raw_model_path, training_file, tmp_path / "out", {"start_layer": 5}, data_args, **options)


def test_checkpoints_are_measured_at_the_settings_as_the_evaluation_measures_them(
    collection, tiny_raw_model_path, training_file, tmp_path
):
    run = run_with(collection, tiny_raw_model_path, training_file, tmp_path)
    run.run()
    history = [entry for entry in run.trainer.state.log_history if "eval_beir_nDCG@10" in entry]
    assert [entry["step"] for entry in history] == [1, 2]
    assert run.trainer.args.metric_for_best_model == "beir_nDCG@10"
    assert run.trainer.state.best_metric == max(entry["eval_beir_nDCG@10"] for entry in history)

    lengths = {"query_max_length": 64, "max_length": 64 + 192}
    reranker = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu", **lengths)
    candidates = from_bm25(read_collection(collection, "test"), 100)
    settings = [
        Setting.resolve(reranker.config, **values | {"cascade": {5: 0.5}} if "cascade" in values else values)
        for values in SETTINGS
    ]
    store = Store(tmp_path / "store", conditions(reranker, candidates, 1, 10))
    results = measure_settings(reranker, candidates, settings, store, timed_pairs=1, recall_at=10)
    found = {f"eval_wings_{slug(result.setting)}_nDCG@10": result.mean("nDCG@10") for result in results}
    assert {name: history[-1][name] for name in found} == pytest.approx(found)
    assert history[-1]["eval_beir_nDCG@10"] == pytest.approx(sum(found.values()) / 3)
    assert len(found) == 3


def test_lists_and_collections_are_measured_together(collection, tiny_raw_model_path, training_file, tmp_path):
    data_args = {"eval_data": [str(training_file)], "eval_settings": None, "eval_queries": 1, "eval_top_k": 3}
    run = run_with(collection, tiny_raw_model_path, training_file, tmp_path, data_args)
    metrics = run.trainer.evaluate()
    assert {"eval_nDCG@10", "eval_wings_layer5_nDCG@10", "eval_wings_layer6_nDCG@10"} <= set(metrics)
    assert run.trainer.args.metric_for_best_model == "nDCG@10"


@pytest.mark.parametrize(
    ("data_args", "fault"),
    [
        ({"eval_settings": ["{"]}, r"eval_settings: '\{' is not JSON"),
        ({"eval_settings": ['{"depth": 3}']}, "must be an object with fields of cutoff_layers, compress_layers"),
        ({"eval_settings": ['{"cutoff_layers": 3}']}, r"cutoff_layers \[3\] have no head"),
        ({"eval_beir": None}, "eval_settings=.* needs eval_beir"),
        ({"eval_top_k": 0}, "eval_top_k is 0, but must be at least 1"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(
    data_args, fault, collection, tiny_raw_model_path, training_file, tmp_path
):
    with pytest.raises(ValueError, match=fault):
        run_with(collection, tiny_raw_model_path, training_file, tmp_path, data_args)


def test_two_collections_of_one_name_are_refused(collection, tiny_raw_model_path, training_file, tmp_path):
    other = write_collection(tmp_path / "more" / "wings", corpus=CORPUS, split="test")
    with pytest.raises(ValueError, match="names two directories wings"):
        run_with(collection, tiny_raw_model_path, training_file, tmp_path, {"eval_beir": [str(collection), str(other)]})


def test_settings_are_parsed():
    assert parse_settings(None) is None
    assert parse_settings(['{"cascade": {"5": 0.5}}']) == [{"cascade": {5: 0.5}}]
