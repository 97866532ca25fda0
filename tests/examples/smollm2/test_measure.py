import json

import numpy as np
import pytest

from flagembedding_matryoshka.evaluation.significance import holm, paired_p_value
from flagembedding_matryoshka.setting import Setting
from tests.collection import write_collection
from tests.encoders import save_bi_encoder

pytest.importorskip("matplotlib")
import measure

JUDGEMENTS = [("q1", "p2", 1), ("q3", "p7", 1)]
DEEP, SHALLOW = Setting((4,)), Setting((2,))


def kind(shift):
    rng = np.random.default_rng(shift)
    bm25 = rng.random(40) / 2
    better = (bm25 + 0.2).tolist()
    plain = {SHALLOW: bm25.tolist(), DEEP: (bm25 + rng.normal(0, 0.1, 40)).tolist()}
    return measure.Kind(plain, {SHALLOW: better, DEEP: better}, bm25.tolist(), 0.3, {SHALLOW: 0.5, DEEP: 1.0})


def test_the_table_has_means_and_p_values_of_each_kind():
    kinds = {"one": kind(1), "two": kind(2)}
    header, _, first, _, means = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in measure.tabulate(kinds).splitlines()
    )
    assert header == ["kind", "queries", "BM25", "all-MiniLM-L6-v2", "2", "4", "p, 4", "fused 2", "fused 4", "p, fused"]
    expected = [
        np.mean(kinds["one"].bm25),
        0.3,
        np.mean(kinds["one"].plain[SHALLOW]),
        np.mean(kinds["one"].plain[DEEP]),
    ]
    assert first[:6] == ["one", "40", *(f"{value:.3f}" for value in expected)]
    p_values = holm([paired_p_value(item.plain[DEEP], item.bm25) for item in kinds.values()])
    assert first[6] == f"{p_values[0]:.3f}" and float(first[9]) < 0.01
    assert means[2] == f"{np.mean([np.mean(item.bm25) for item in kinds.values()]):.3f}" and means[6] == ""


def test_an_interval_weighs_kinds_equally_and_shrinks_with_queries():
    mean, low, high = measure.interval([[0.0] * 1000, [0.5, 1.5]])
    assert mean == pytest.approx(0.5) and low < mean < high
    few, many = (measure.interval([np.random.default_rng(1).random(count)]) for count in (20, 2000))
    assert few[2] - few[1] > 5 * (many[2] - many[1])


def test_the_figure_has_a_panel_for_each_group(tmp_path):
    measure.draw({"first group": [kind(1), kind(2)], "second group": [kind(3)]}, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert text.startswith("<?xml") and text.count('id="axes_') == 2


@pytest.mark.slow
def test_a_split_is_measured_by_the_evaluation(tiny_layerwise_path, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "bi_encoder_path", lambda: str(save_bi_encoder(tmp_path / "encoder")))
    monkeypatch.setattr(measure, "GROUPS", {"all": ("code",)})
    write_collection(tmp_path / "data" / "code", judgements=JUDGEMENTS, split="test")
    output = tmp_path / "output"
    command = [str(tmp_path / "data"), "--output", str(output), "--model", str(tiny_layerwise_path)]
    monkeypatch.setattr("sys.argv", ["measure.py", *command, "--split", "test", "--fusion", "0.5"])
    measure.main()
    results = json.loads((output / "code" / "results.json").read_text())
    row = (output / "table.md").read_text().splitlines()[2].split("|")
    assert row[1].strip() == "code" and float(row[3]) == pytest.approx(results["baselines"][0]["nDCG@10"], abs=5e-4)
    assert (output / "quality_cost.svg").is_file()
    fused = measure.measure(tmp_path / "data" / "code", output / "code", str(tiny_layerwise_path), 0.5, "test", 50)
    stale = json.loads((output / "code" / "settings" / "layer6.json").read_text())
    stale["setting"]["cutoff_layers"] = [5]  # of an earlier evaluation
    (output / "code" / "settings" / "cascade_2-0.5_layer5.json").write_text(json.dumps(stale))
    plain = measure.measure(tmp_path / "data" / "code", output / "code", str(tiny_layerwise_path), 0.0, "test", 50)
    assert plain.plain == fused.plain == plain.fused != fused.fused
