import math
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.checkpoints.weights import weights_fingerprint
from flagembedding_matryoshka.inference.calibration import Isotonic, Platt, from_json, to_json
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan, load_plan
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.templates import Template

pytestmark = pytest.mark.usefixtures("one_thread")
EXITS = (2, 3, 4, 5, 6)
DEEP, SHALLOW = Platt(0.5, -1.0), Isotonic((-1.0, 0.0, 2.0), (0.125, 0.25, 0.75))
NARROW = Platt(0.25, 0.5)
WIDTH = {"compress_layers": [2, 5], "compress_ratio": 2}
DOCUMENTS = ["wing " * (3 * number % 11) for number in range(8)]
PAIRS = [("the wing", document) for document in DOCUMENTS]

unit = st.floats(0, 1)
isotonic = st.lists(st.tuples(st.floats(-50, 50), unit), min_size=1, max_size=9, unique_by=lambda point: point[0]).map(
    lambda points: Isotonic(sorted(score for score, _ in points), sorted(value for _, value in points))
)
platt = st.tuples(st.floats(0, 100), st.floats(-100, 100)).map(lambda values: Platt(*values))
calibrations = isotonic | platt


@given(calibrations, st.lists(st.floats(-100, 100), min_size=1))
def test_probabilities_never_fall(calibration, scores):
    found = calibration(torch.tensor(sorted(scores)))
    assert found.dtype == torch.float64
    assert bool((found >= 0).all() and (found <= 1).all() and (found.diff() >= -1e-15).all())


@given(calibrations)
def test_json_holds_it(calibration):
    assert from_json(to_json(calibration)) == calibration


def test_points_are_met_and_between_them_it_is_straight():
    assert SHALLOW(torch.tensor([-9.0, -1.0, -0.5, 0.0, 1.0, 2.0, 9.0])).tolist() == [
        *(0.125, 0.125, 0.1875, 0.25, 0.5, 0.75, 0.75)
    ]
    assert DEEP(torch.tensor([2.0])).tolist() == [0.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Isotonic([], []), "0 scores and 0"),
        (lambda: Isotonic([1.0, 2.0], [0.5]), "2 scores and 1"),
        (lambda: Isotonic([1.0, 1.0], [0.5, 0.6]), "must ascend"),
        (lambda: Isotonic([1.0, math.nan], [0.5, 0.6]), "must ascend"),
        (lambda: Isotonic([1.0, 2.0], [0.5, 0.4]), "do not fall"),
        (lambda: Isotonic([1.0], [1.5]), r"lie in \[0, 1\]"),
        (lambda: Platt(-1.0, 0.0), "must not fall"),
        (lambda: Platt(1.0, math.inf), "must not fall"),
    ],
)
def test_what_is_no_monotone_map_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def plain(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")


@pytest.fixture
def model(tiny_layerwise_path, tmp_path, plain):
    """With a plan: calibrations of exits 3 and 6, and of exit 4 at the width that both layers make together there."""
    model = str(shutil.copytree(tiny_layerwise_path, tmp_path / "model"))
    plan = Plan(
        *(EXITS, (), "d/test", 9, "BM25's first 10"),
        settings=(
            Measurement(Setting(6), 1.0, 1.0, 1.0, DEEP),
            Measurement(Setting(3), 0.5, 0.9, 0.8, SHALLOW),
            Measurement(Setting(4, (2,), 2), 0.4, 0.9, None, NARROW),
            Measurement(Setting(5), 0.8, 0.9),
            Measurement(Setting(6, cascade=((3, 0.5),)), 0.75, 0.9),
        ),
        held_out_queries=8,
        scored_with=plain.scored_with(ScoringOptions.resolve(plain, {})),
        weights=weights_fingerprint(inspect_checkpoint(model)),
    )
    plan.write(Path(model) / PLAN_NAME)
    assert load_plan(model, plain.config) == plan
    return model


@pytest.fixture
def calibrated(model):
    return MatryoshkaReranker(model, dtype="float32", devices="cpu", normalize="calibrated")


def mapped(calibration, scores):
    return pytest.approx(calibration(torch.tensor(scores)).tolist())


def test_scores_of_each_exit_go_through_its_own_map(calibrated, plain):
    shallow, deep = plain.compute_score(PAIRS, cutoff_layers=[3, 6])
    assert calibrated.compute_score(PAIRS) == mapped(DEEP, deep)
    both = calibrated.compute_score(PAIRS, cutoff_layers=[3, 6])
    assert both == [mapped(SHALLOW, shallow), mapped(DEEP, deep)]
    assert calibrated.compute_score(PAIRS, normalize=False) == pytest.approx(deep)
    assert plain.compute_score([]) == calibrated.compute_score([]) == []


def test_a_layer_that_compresses_behind_an_exit_does_not_change_its_map(calibrated, plain):
    scores = plain.compute_score(PAIRS, cutoff_layers=4, **WIDTH)
    assert calibrated.compute_score(PAIRS, cutoff_layers=4, **WIDTH) == mapped(NARROW, scores)


def test_rankings_keep_the_order_of_the_scores(calibrated, plain):
    for options in ({}, {"cutoff_layers": 3}, {"cascade": {3: 0.5}}):
        expected, found = (each.rank("the wing", DOCUMENTS, **options) for each in (plain, calibrated))
        assert [hit["corpus_id"] for hit in found] == [hit["corpus_id"] for hit in expected]
        for hit, before in zip(found, expected, strict=True):
            exit_layer = before.get("cutoff_layer", options.get("cutoff_layers", 6))
            assert [hit["score"]] == mapped({3: SHALLOW, 6: DEEP}[exit_layer], [before["score"]])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cutoff_layers": 5}, "no calibration of 5 layers; it has 6 layers; 3 layers; 4 layers, ratio 2 after 2"),
        ({"cutoff_layers": [3, 5]}, "no calibration of 5 layers"),
        ({"cutoff_layers": 6, **WIDTH}, "no calibration of 6 layers, ratio 2 after 2, 5"),
        ({"prompt": "Is it?"}, "was measured with prompt '.*', and not 'Is it"),
    ],
)
def test_what_was_not_calibrated_is_refused_by_name_before_anything_runs(calibrated, options, named):
    with pytest.raises(ValueError, match=named):
        calibrated.compute_score([], **options)
    if options.get("cutoff_layers") != [3, 5]:
        with pytest.raises(ValueError, match=named):
            calibrated.rank("", [], **options)


def test_a_cascade_needs_a_map_for_each_of_its_exits(calibrated):
    with pytest.raises(ValueError, match="no calibration of 2 layers"):
        calibrated.rank("the wing", DOCUMENTS, cascade={2: 0.5})


def test_a_re_ranker_is_not_made_without_what_it_needs(model, tiny_layerwise_path):
    with pytest.raises(ValueError, match="no calibration of 5 layers"):
        MatryoshkaReranker(model, devices="cpu", dtype="float32", normalize="calibrated", cutoff_layers=5)
    with pytest.raises(ValueError, match="was measured with quantization None, and not 'int8'"):
        MatryoshkaReranker(model, devices="cpu", normalize="calibrated", quantization="int8")
    with pytest.raises(ValueError, match="was measured with dtype 'float32', and not 'bfloat16'"):
        MatryoshkaReranker(model, devices="cpu", normalize="calibrated", dtype="bfloat16")
    assert MatryoshkaReranker(model, devices="cpu", budget=0.4, dtype="bfloat16").planned == Setting(4, (2,), 2)
    with pytest.raises(FileNotFoundError, match="has no matryoshka_plan"):
        MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu", normalize="calibrated")
    with pytest.raises(FileNotFoundError, match="has no matryoshka_plan"):
        MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu").compute_score(PAIRS, normalize="calibrated")
    with pytest.raises(ValueError, match="normalize is 'sigmoid', but must be True, False or 'calibrated'"):
        MatryoshkaReranker(model, devices="cpu", normalize="sigmoid")


def test_an_older_plan_has_no_calibration(model):
    Plan(EXITS, (), "d/test", 9, "x", (Measurement(Setting(6), 1.0, 1.0),)).write(Path(model) / PLAN_NAME)
    with pytest.raises(ValueError, match="no calibration of 6 layers; it has none at all"):
        MatryoshkaReranker(model, devices="cpu", normalize="calibrated")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": 2.0}, "temperature 1.0, and not 2.0"),
        ({"query_instruction": "Q: "}, "query_instruction 'A: ', and not 'Q: '"),
        (
            {"instructed": {"query_instruction": "{instruction}"}, "instruction": "Heat?"},
            "instruction '', and not 'Hea",
        ),
    ],
)
def test_words_and_temperature_of_another_template_are_refused(changes, named, model):
    template = Template().to_json() | changes
    with pytest.raises(ValueError, match=f"was measured with {named}"):
        MatryoshkaReranker(model, devices="cpu", dtype="float32", normalize="calibrated", template=template)


def test_the_checkpoints_own_instruction_is_the_same_as_naming_it(model, plain):
    own = {"instructed": {"query_instruction": "{instruction}"}, "instruction": "Heat?"}
    options = {"devices": "cpu", "dtype": "float32", "template": Template().to_json() | own}
    reranker = MatryoshkaReranker(model, **options)
    plan = Plan(
        *(EXITS, (), "d/test", 9, "x"),
        settings=(Measurement(Setting(6), 1.0, 1.0, 1.0, DEEP),),
        scored_with=reranker.scored_with(ScoringOptions.resolve(reranker, {})),
        weights=weights_fingerprint(inspect_checkpoint(model)),
    )
    plan.write(Path(model) / PLAN_NAME)
    calibrated = MatryoshkaReranker(model, **options, normalize="calibrated")
    assert calibrated.compute_score(PAIRS) == calibrated.compute_score(PAIRS, instruction="Heat?")
    with pytest.raises(ValueError, match=r"was measured with instruction 'Heat.', and not 'Wing"):
        calibrated.compute_score(PAIRS, instruction="Wing?")


def test_min_score_of_probabilities_holds_beside_a_cascade(model):
    reranker = MatryoshkaReranker(model, dtype="float32", devices="cpu", normalize="calibrated")
    options = {"cascade": {3: 0.5}}
    every = reranker.rank("the wing", DOCUMENTS, **options)
    least = sorted(hit["score"] for hit in every)[4]
    kept = [hit for hit in every if hit["score"] >= least]
    assert {hit["cutoff_layer"] for hit in every} == {3, 6} and 0 < len(kept) < len(every)
    assert reranker.rank("the wing", DOCUMENTS, min_score=least, **options) == kept
