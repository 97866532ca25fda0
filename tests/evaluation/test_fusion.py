from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flagembedding_matryoshka.evaluation import measure
from flagembedding_matryoshka.evaluation.baselines import Baseline, as_given, at_random, by_bi_encoder
from flagembedding_matryoshka.evaluation.candidates import Halves
from flagembedding_matryoshka.evaluation.fusion import WeightChoice, compare_fusion, fuse_orders, measure_fusion
from flagembedding_matryoshka.evaluation.measure import measure_fused_settings, measure_settings
from flagembedding_matryoshka.evaluation.report.tables import fusion_table, orders_table, weights_table
from flagembedding_matryoshka.evaluation.results import Result, Store, conditions
from flagembedding_matryoshka.evaluation.runs import first_stage_run, fuse_runs, in_order, per_query, ranking
from flagembedding_matryoshka.evaluation.significance import holm, paired_p_value
from flagembedding_matryoshka.setting import Setting
from tests.encoders import save_bi_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
HALF, FULL, CASCADE = Setting(3), Setting(6), Setting(6, cascade=((3, 0.5),))
SETTINGS = [HALF, FULL, CASCADE]
COSTS = (4, 10)
"""timed_pairs and recall_at."""


@pytest.fixture(scope="module")
def measured(reranker, tmp_path_factory):
    """Plain results of a list of candidates, measured once."""
    found = {}

    def results(candidates):
        key = candidates.fingerprint()
        if key not in found:
            store = Store(tmp_path_factory.mktemp("measured"), conditions(reranker, candidates, *COSTS))
            found[key] = measure_settings(reranker, candidates, SETTINGS, store, *COSTS), store
        return found[key]

    return results


def test_exits_are_fused_from_measured_scores(reranker, candidates, measured, monkeypatch):
    def second_pass(*arguments):
        raise AssertionError("the model ran again")

    results, store = measured(candidates)
    with monkeypatch.context() as patched:
        patched.setattr(measure, "score_exits", second_pass)
        patched.setattr(measure, "tokenize", second_pass)
        fused = measure_fused_settings(reranker, candidates, results[:2], store, 0.8, *COSTS)
    for plain, found in zip(results[:2], fused, strict=True):
        run = fuse_runs(candidates, store.run(plain.setting), [(first_stage_run(candidates), 0.8)])
        assert found == replace(plain, per_query=per_query(candidates, run, 10))
    again = measure_settings(
        *(reranker, candidates, [HALF, FULL], Store(store.directory / "again", store.conditions), *COSTS), fusion=0.8
    )
    assert [item.per_query for item in again] == [item.per_query for item in fused]


@pytest.mark.parametrize("setting", [FULL, CASCADE])
def test_a_fused_setting_ranks_as_the_re_ranker_does(reranker, candidates, measured, setting):
    results, store = measured(candidates)
    fused = dict(zip(SETTINGS, measure_fused_settings(reranker, candidates, results, store, 5.0, *COSTS), strict=True))
    rankings = {}
    for query, passages in candidates.passages.items():
        hits = reranker.rank(
            *(candidates.collection.queries[query], candidates.texts(query)),
            cascade=dict(setting.cascade),
            first_stage_scores=candidates.first_stage[query],
            fusion=5.0,
        )
        rankings[query] = [passages[hit["corpus_id"]] for hit in hits]
    assert fused[setting].per_query == per_query(candidates, in_order(rankings), 10)
    found = Store(store.directory / "fused", {}).run(setting)
    assert {query: ranking(scores) for query, scores in found.items()} == {q: ids for q, ids in rankings.items() if ids}


def test_a_fused_cascade_is_stored_beside_the_plain_one(reranker, candidates, measured):
    results, store = measured(candidates)
    measure_fused_settings(reranker, candidates, results, store, 5.0, *COSTS)
    assert store.run(CASCADE) != Store(store.directory / "fused", {}).run(CASCADE)
    assert store.load(CASCADE) == results[2]


def test_a_fused_cascade_is_measured_once_for_each_weight_and_first_stage(reranker, candidates, measured, monkeypatch):
    results, store = measured(candidates)
    ran = []
    run_cascade = measure.run_cascade
    monkeypatch.setattr(measure, "run_cascade", lambda *given: ran.append(given) or run_cascade(*given))
    others = {query: [-score for score in scores] for query, scores in candidates.first_stage.items()}
    again = [
        measure_fused_settings(reranker, given, results, store, weight, *COSTS)
        for given, weight in (
            (candidates, 0.3),
            (candidates, 0.3),
            (candidates, 0.4),
            (replace(candidates, first_stage=others), 0.4),
        )
    ]
    assert again[0] == again[1] and len(ran) == 3


def test_a_weight_of_zero_runs_nothing(candidates, measured):
    results, store = measured(candidates)
    assert measure_fused_settings(None, candidates, results, store, 0.0, *COSTS) == results


def lists_of(count):
    """Candidates with nothing but queries."""
    return SimpleNamespace(passages={f"q{number}": [] for number in range(count)})


@pytest.fixture
def report():
    """40 queries, for which fusion helps the full network much and the shallower exit little."""
    draw = np.random.default_rng(0)
    first, half, full = draw.random((3, 40))

    def result(setting, values, flops=1e9):
        return Result(setting, flops, 100.0, None, {"nDCG@10": list(values)})

    plain = [result(HALF, half, 5e8), result(FULL, full)]
    fused = [result(HALF, half + 0.01 * draw.normal(size=40), 5e8), result(FULL, full + 0.1 + 0.05 * draw.random(40))]
    choice = WeightChoice((0.5,), {(0.0,): 0.4, (0.5,): 0.6})
    first_stage = Baseline("BM25's first 6, as given", {"nDCG@10": list(first)})
    return compare_fusion(lists_of(40), choice, plain, fused, FULL, first_stage), plain, fused, first


def test_changes_are_measured_on_the_held_out_half(report):
    found, plain, fused, first = report
    halves = Halves.of(lists_of(40).passages)
    places = list(halves.held_out)
    assert (found.queries, found.held_out_queries) == (len(halves.choosing), len(places))
    assert found.first_stage.mean == pytest.approx(first[places].mean())
    tests = {}
    for item, before, made in zip(found.settings, plain, fused, strict=True):
        values = [np.array(result.per_query["nDCG@10"])[places] for result in (before, made)]
        assert item.result is made and item.result.setting == before.setting
        assert (item.plain.mean, item.fused.mean) == pytest.approx([one.mean() for one in values])
        for change, reference in ((item.against_plain, values[0]), (item.against_first_stage, first[places])):
            difference = values[1] - reference
            assert change.change == pytest.approx(difference.mean())
            low, high = change.interval
            assert low <= change.change <= high
        low, high = item.fused.interval
        assert low < item.fused.mean < high
        tests[before.setting] = holm([paired_p_value(values[1], other) for other in (values[0], first[places])])
    # The two tests of the full network are a family, whatever else is measured.
    for item in found.settings:
        p_values = [item.against_plain.p_value, item.against_first_stage.p_value]
        assert p_values == pytest.approx(tests[item.result.setting])
    assert found.settings[1].against_plain.p_value < 0.01 < found.settings[0].against_plain.p_value


def test_other_settings_are_tested_together(report):
    found, plain, fused, _ = report
    more = [replace(item, setting=Setting(depth)) for depth in (4, 5) for item in plain[:1]]
    first_stage = Baseline("x", {"nDCG@10": [0.5] * 40})
    many = compare_fusion(lists_of(40), found.choice, [*plain, *more], [*fused, *more], FULL, first_stage)
    few = compare_fusion(lists_of(40), found.choice, plain, fused, FULL, first_stage)
    assert many.settings[1] == few.settings[1]
    assert many.settings[0].against_first_stage.p_value > few.settings[0].against_first_stage.p_value
    assert [item.result.setting.depth for item in many.settings] == [3, 6, 4, 5]


def test_the_summary_has_the_choice_and_the_change(report):
    found, *_ = report
    _, full = found.settings
    low, high = full.against_plain.interval
    assert f"fusion weight 0.5, chosen by {found.queries} queries; on the {found.held_out_queries} others" in (
        found.summary()
    )
    assert f"nDCG@10 of 6 layers: {full.plain.mean:.4f} plain → {full.fused.mean:.4f} fused, " in found.summary()
    p_value = full.against_plain.p_value
    change = f"{full.against_plain.change:+.4f} (95 % {low:+.4f} to {high:+.4f}, p = {p_value:.3f})"
    assert change in found.summary()
    assert f"against the first stage alone ({found.first_stage.mean:.4f}) " in found.summary()


def cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_tables_hold_both_orders_of_each_setting(report):
    found, *_ = report
    head, _, first, half, full = cells(fusion_table(found))
    assert head[:4] == ["setting", "plain", "fused", "95 %"] and head[7] == "against first stage alone"
    assert first[:2] == ["first stage alone", f"{found.first_stage.mean:.4f}"]
    assert half[:3] == ["3 layers", f"{found.settings[0].plain.mean:.4f}", f"{found.settings[0].fused.mean:.4f}"]
    assert full[0] == "6 layers" and full[4] == f"{found.settings[1].against_plain.change:+.4f}"
    tried = cells(weights_table(found))
    assert tried[0] == ["weight", "0", "0.5"] and tried[2][1:] == ["0.4000", "0.6000"]


def test_bi_encoders_are_fused_too(reranker, candidates, measured, tmp_path):
    results, store = measured(candidates)
    encoder = by_bi_encoder(
        *(candidates, "tiny", str(save_bi_encoder(tmp_path / "encoder"))), *COSTS, device="cpu", dtype=torch.float32
    )
    baselines = [as_given(candidates, 10), at_random(candidates, 10), encoder]
    weights = (0.0, 0.5, 4.0)
    report = measure_fusion(reranker, candidates, results, baselines, FULL, store, weights, *COSTS)
    names = ["BM25's first 6, as given", "tiny", "tiny + first stage", "6 layers + first stage"]
    orders = {item.order.baseline.name: item for item in report.orders}
    assert list(orders) == [*names, "6 layers + first stage + tiny"]
    assert [len(item.order.weights) for item in report.orders] == [0, 0, 1, 1, 2]
    full = next(item for item in report.settings if item.result.setting == FULL)
    reference = orders["6 layers + first stage"]
    assert reference.order.weights == [("first stage", report.weight)] and reference.change is None
    assert reference.order.baseline.per_query == full.result.per_query and reference.held_out == full.fused

    first, scores = first_stage_run(candidates), store.run(FULL)
    without, all_three = orders["tiny + first stage"].order, orders["6 layers + first stage + tiny"].order
    ((_, weight),) = without.weights
    assert without.baseline.per_query == per_query(
        candidates, fuse_runs(candidates, encoder.run, [(first, weight)]), 10
    )
    (_, of_first), (name, of_encoder) = all_three.weights
    assert name == "tiny"
    fused = fuse_runs(candidates, scores, [(first, of_first), (encoder.run, of_encoder)])
    assert all_three.baseline.per_query == per_query(candidates, fused, 10)
    assert without.baseline.flops_per_pair == encoder.flops_per_pair
    assert all_three.baseline.flops_per_pair == encoder.flops_per_pair + full.result.flops_per_pair
    assert all_three.baseline.pairs_per_second < encoder.pairs_per_second
    assert [row[0] for row in cells(orders_table(report))[2:]] == list(orders)
    assert [item["name"] for item in report.as_json()["orders"]] == list(orders)


def test_without_a_bi_encoder_there_are_no_orders(candidates, measured):
    results, store = measured(candidates)
    baselines = [as_given(candidates, 10), at_random(candidates, 10)]
    assert fuse_orders(candidates, store.run(FULL), results[1], 0.5, baselines, (0.5,), 10) == []


def test_a_choice_of_the_largest_weight_is_logged(reranker, candidates, measured, caplog):
    (_, full, _), store = measured(candidates)
    judged = candidates.collection.relevant
    first_stage = {
        query: [float(passage in judged[query]) for passage in passages]
        for query, passages in candidates.passages.items()
    }
    sure = replace(candidates, first_stage=first_stage)
    for weights, is_said in (((0.0, 9.0), True), ((9.0,), False), ((9.0, 10.0), False)):
        report = measure_fusion(reranker, sure, [full], [as_given(sure, 10)], FULL, store, weights, *COSTS)
        assert report.weight == 9.0
        assert ("fusion weight 9 is the largest weight tried" in caplog.text) is is_said
        caplog.clear()
