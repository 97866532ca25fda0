import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from flagembedding_matryoshka import CostWiseMistralConfig, MatryoshkaReranker
from flagembedding_matryoshka.checkpoints import weights
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.checkpoints.weights import weights_fingerprint
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan, load_plan
from flagembedding_matryoshka.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")
EXITS = (2, 3, 4, 5, 6)
FULL = Measurement(Setting(6), 1.0, 1.0)
HALF = Measurement(Setting(3), 0.5, 0.9)
NARROW = Measurement(Setting(6, (2,), 2), 0.7, 0.97)
DROPPING = Measurement(Setting(6, cascade=((3, 0.25),)), 0.625, 0.99)
DOCUMENTS = ["wing " * (3 * number % 11) for number in range(12)]


def plan_of(*settings, **changes):
    about = {"exit_layers": EXITS, "adapters": (), "data": "d/test", "queries": 9, "candidates": "BM25's first 10"}
    return Plan(**about | changes, settings=settings)


PLAN = plan_of(FULL, HALF, NARROW, DROPPING)


@pytest.fixture
def model(tiny_layerwise_path, tmp_path):
    """A model that a plan can be put beside."""
    return str(shutil.copytree(tiny_layerwise_path, tmp_path / "model"))


def planned(model, plan=PLAN, **options):
    plan.write(Path(model) / PLAN_NAME)
    return MatryoshkaReranker(model, dtype="float32", devices="cpu", **options)


@pytest.mark.parametrize(
    ("wanted", "expected", "without_cascade"),
    [
        ({"budget": 1.0}, FULL, FULL),
        ({"budget": 0.99}, DROPPING, NARROW),
        ({"budget": 0.65}, DROPPING, HALF),
        ({"budget": 0.5}, HALF, HALF),
        ({"quality": 1.0}, FULL, FULL),
        ({"quality": 0.98}, DROPPING, FULL),
        ({"quality": 0.95}, DROPPING, NARROW),
        ({"quality": 0.1}, HALF, HALF),
    ],
)
def test_the_setting_that_is_chosen(wanted, expected, without_cascade):
    assert PLAN.choose(**wanted) == expected.setting
    assert PLAN.choose(**wanted, cascades=False) == without_cascade.setting


shares = st.floats(0.01, 1.5)
measured = st.lists(st.tuples(shares, shares, st.booleans()), min_size=1, max_size=12).map(
    lambda rows: [
        Measurement(Setting(number, cascade=((1, 0.5),) if drops else ()), cost, good)
        for number, (cost, good, drops) in enumerate(rows)
    ]
)


@given(measured, st.floats(0.01, 1.0), st.booleans())
def test_nothing_within_a_budget_is_better_and_nothing_as_good_is_cheaper(settings, budget, cascades):
    allowed = [item for item in settings if cascades or not item.setting.cascade]
    within = [item for item in allowed if item.flops_share <= budget]
    if not within:
        with pytest.raises(ValueError, match=r"cheapest measured setting|holds no"):
            plan_of(*settings).choose(budget=budget, cascades=cascades)
        return
    setting = plan_of(*settings).choose(budget=budget, cascades=cascades)
    (chosen,) = (item for item in within if item.setting == setting)
    assert all(item.ndcg_share <= chosen.ndcg_share for item in within)
    assert all(item.flops_share >= chosen.flops_share for item in within if item.ndcg_share == chosen.ndcg_share)


@given(measured, shares, st.booleans())
def test_nothing_that_reaches_a_quality_is_cheaper_and_nothing_as_cheap_is_better(settings, quality, cascades):
    allowed = [item for item in settings if cascades or not item.setting.cascade]
    good = [item for item in allowed if item.ndcg_share >= quality]
    if not good:
        with pytest.raises(ValueError, match=r"the best measured setting|holds no"):
            plan_of(*settings).choose(quality=quality, cascades=cascades)
        return
    setting = plan_of(*settings).choose(quality=quality, cascades=cascades)
    (chosen,) = (item for item in good if item.setting == setting)
    assert all(item.flops_share >= chosen.flops_share for item in good)
    assert all(item.ndcg_share <= chosen.ndcg_share for item in good if item.flops_share == chosen.flops_share)


@given(measured, st.floats(0.02, 1.0))
def test_a_larger_budget_never_chooses_worse(settings, budget):
    plan = plan_of(*settings)
    quality = {item.setting: item.ndcg_share for item in plan.settings}
    try:
        smaller = plan.choose(budget=budget / 2)
    except ValueError:
        return
    assert quality[plan.choose(budget=budget)] >= quality[smaller]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"budget": 0.4}, r"budget=0.4: the cheapest measured setting, 3 layers, costs 0.5 of the full network's"),
        ({"quality": 1.01}, r"quality=1.01: the best measured setting, 6 layers, reaches 1 of the full network's nDCG"),
        ({"budget": 40}, r"budget=40, but it is a share .* in \(0, 1\]"),
        ({"budget": 0.0}, r"budget=0.0, but it is a share"),
        ({"budget": math.nan}, r"budget=nan, but it is a share"),
        ({"quality": math.nan}, r"quality=nan, but it is a share"),
        ({"quality": -1}, r"quality=-1, but it is a share"),
        ({"budget": 0.5, "quality": 0.9}, r"budget=0.5 and quality=0.9: give one of them"),
    ],
)
def test_what_cannot_be_had_is_refused(model, wanted, message):
    with pytest.raises(ValueError, match=message):
        planned(model, **wanted)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"cutoff_layers": 3}, "{'cutoff_layers': 3}"),
        ({"compress_layers": [2], "compress_ratio": 2}, r"{'compress_layers': \[2\], 'compress_ratio': 2}"),
        ({"max_layer": 4}, "{'max_layer': 4}"),
    ],
)
def test_a_depth_or_width_beside_a_plan_is_refused(model, given, named):
    with pytest.raises(ValueError, match=f"choose depth and width themselves; leave out {named}"):
        planned(model, budget=0.5, **given)


def test_without_a_plan_the_command_that_makes_one_is_named(model):
    with pytest.raises(
        FileNotFoundError, match=r"has no matryoshka_plan.json.*evaluation --model \S+/model --data DIR"
    ):
        MatryoshkaReranker(model, quality=0.9)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            plan_of(FULL, exit_layers=(4, 8)),
            r"plan of another model: it measured exits \[4, 8\], and .* \[2, 3, 4, 5, 6",
        ),
        (plan_of(FULL, Measurement(Setting(7), 1.0, 1.0)), r"another model: cutoff_layers \[7\] have no head"),
        (plan_of(Measurement(Setting(6, (9,), 2), 0.5, 1.0)), r"another model: compress_layers \[9\] do not exist"),
        (plan_of(Measurement(Setting(6, cascade=((1, 0.5),)), 1, 1)), r"another model: cascade drops .* after layer 1"),
        (plan_of(FULL, adapters=("layer",)), r"the adapters \['layer'\], and not \[\]"),
    ],
)
def test_the_plan_of_another_model_is_refused(model, plan, message):
    with pytest.raises(ValueError, match=message):
        planned(model, plan, budget=1.0)


def _stored(**changes):
    stored = json.loads(json.dumps(PLAN, default=vars))
    return json.dumps(stored | changes)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        _stored(settings=[{}]),
        _stored(unknown=1),
        _stored(settings=[{"setting": {"cutoff_layer": 6}, "flops_share": 1.0, "ndcg_share": 1.0}]),
        _stored(settings=[vars(FULL) | {"setting": vars(FULL.setting), "flops_share": "1"}]),
        _stored(settings=[vars(FULL) | {"setting": vars(FULL.setting), "ndcg_share": math.inf}]),
        _stored(fusion=-0.5),
        _stored(fusion=math.nan),
        _stored(fusion="auto"),
        _stored(fusion=True),
    ],
)
def test_what_is_no_plan_is_refused_with_its_name(model, text, tmp_path):
    (tmp_path / "model" / PLAN_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"matryoshka_plan.json is no plan .*Write it anew: python -m"):
        MatryoshkaReranker(model, budget=1.0)


def test_a_plan_is_read_as_it_was_written(model, tmp_path):
    config = CostWiseMistralConfig.from_pretrained(model)
    for fusion in (None, 0, 0.35):
        plan = plan_of(*PLAN.settings, adapters=("one",), data="é/test", fusion=fusion)
        plan.write(tmp_path / "model" / PLAN_NAME)
        assert load_plan(model, config, ["somewhere/one"]) == plan


def test_an_older_plan_has_no_weight(model, tmp_path):
    stored = json.loads(_stored())
    del stored["fusion"]
    (tmp_path / "model" / PLAN_NAME).write_text(json.dumps(stored))
    assert load_plan(model, CostWiseMistralConfig.from_pretrained(model)) == PLAN


def change_weights(model):
    """Change the value of one weight; the file's size stays."""
    path = Path(model) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_plan_is_of_the_weights_that_it_was_measured_with(model):
    plan = replace(PLAN, weights=weights_fingerprint(inspect_checkpoint(model)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "names no weights")
        warnings.filterwarnings("error", ".*names no weights")
        assert planned(model, plan, budget=0.65).planned == DROPPING.setting
    change_weights(model)
    for options in ({"budget": 0.65}, {"quality": 0.9}, {"normalize": "calibrated"}):
        with pytest.raises(ValueError, match=r"plan.json was measured with other weights, .* --model \S+/model"):
            MatryoshkaReranker(model, devices="cpu", **options)
    with pytest.raises(ValueError, match="measured with other weights"):
        load_plan(model, CostWiseMistralConfig.from_pretrained(model))


def test_a_plan_without_a_fingerprint_is_used_with_a_warning(model):
    with pytest.warns(UserWarning, match=r"plan.json names no weights: .* --model \S+/model"):
        assert planned(model, budget=0.65).planned == DROPPING.setting


def test_without_a_plan_no_weights_are_hashed(model, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("weights were hashed")

    monkeypatch.setattr(weights, "file_hash", fail)
    plan = replace(PLAN, weights="0")
    reranker = planned(model, plan)
    reranker.compute_score([("heat", "air")])
    with pytest.raises(AssertionError, match="weights were hashed"):
        planned(model, plan, budget=0.65)


def test_rank_takes_the_cascade_and_scores_take_the_best_without(model):
    chosen = planned(model, budget=0.65)
    plain = MatryoshkaReranker(model, dtype="float32", devices="cpu")
    assert chosen.planned == DROPPING.setting
    expected = plain.rank("the wing", DOCUMENTS, cascade={3: 0.25})
    assert chosen.rank("the wing", DOCUMENTS) == expected
    (together,) = chosen.rank_batch(["the wing"], [DOCUMENTS])
    assert together == expected
    pairs = [("the wing", document) for document in DOCUMENTS]
    assert chosen.compute_score(pairs) == plain.compute_score(pairs, cutoff_layers=3)
    assert chosen.estimate_flops(pairs) == plain.estimate_flops(pairs, cutoff_layers=3)


def test_a_chosen_cascade_fills_up_to_top_k_with_those_that_stopped(model):
    chosen = planned(model, budget=0.65)
    ranked = chosen.rank("the wing", DOCUMENTS, top_k=5)
    assert [item["cutoff_layer"] for item in ranked] == [6, 6, 6, 3, 3]
    with pytest.raises(ValueError, match="fewer than top_k=5"):
        chosen.rank("the wing", DOCUMENTS, top_k=5, cascade={3: 0.25}, cutoff_layers=6)


@pytest.mark.parametrize(
    "own", [{"cutoff_layers": 4}, {"compress_layer": [2], "compress_ratio": 2}, {"cascade": {2: 0.5}}]
)
def test_a_call_with_a_depth_width_or_cascade_of_its_own_leaves_the_plan(model, own):
    chosen = planned(model, budget=0.65)
    plain = MatryoshkaReranker(model, dtype="float32", devices="cpu")
    assert chosen.rank("the wing", DOCUMENTS, **own) == plain.rank("the wing", DOCUMENTS, **{"cutoff_layers": 3} | own)


def test_a_chosen_width_is_used_by_both(model):
    chosen = planned(model, plan_of(FULL, NARROW), budget=0.8)
    width = {"compress_layers": [2], "compress_ratio": 2}
    plain = MatryoshkaReranker(model, dtype="float32", devices="cpu", **width)
    assert chosen.rank("the wing", DOCUMENTS) == plain.rank("the wing", DOCUMENTS)
    assert chosen.compute_score([("a", "wing wing")]) == plain.compute_score([("a", "wing wing")])


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (Setting(6), "6 layers"),
        (Setting(6, (2, 4), 2), "6 layers, ratio 2 after 2, 4"),
        (Setting(6, (2,), 4, ((3, 0.5), (5, 0.2))), "3:0.5 → 5:0.2 → 6 layers, ratio 4 after 2"),
    ],
)
def test_a_setting_has_a_name_for_people(setting, text):
    assert str(setting) == text
