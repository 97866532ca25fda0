import json

import pytest

from benchmarks import deadlines
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation.candidates import from_bm25
from flagembedding_matryoshka.text.collections import read_collection
from tests.collection import write_collection


def test_each_way_ranks_every_query(tiny_layerwise_path, tmp_path, one_thread, capsys):
    data, output = write_collection(tmp_path / "beir"), tmp_path / "deadlines.json"
    given = [
        "--model",
        tiny_layerwise_path,
        "--data",
        data,
        "--split",
        "train",
        "--dtype",
        "float32",
        "--output",
        output,
    ]
    deadlines.main(list(map(str, given)))
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report == json.loads(printed.splitlines()[-1])
    assert report["queries"] == 1
    fixed, (cascade,), limited = report["ways"][:5], report["ways"][5:6], report["ways"][6:]
    assert [row["cutoff_layers"] for row in fixed] == [2, 3, 4, 5, 6]
    assert all(row["exit_of_first_ten"] == row["exit_of_all"] == row["cutoff_layers"] for row in fixed)
    assert cascade["cascade"] == {"2": deadlines.CASCADE_SHARE} and 2 < cascade["exit_of_all"] < 6
    assert len(limited) == len(deadlines.SHARES) and printed.count("| in ") == len(limited)
    for row in limited:
        assert 2 <= row["exit_of_all"] <= row["exit_of_first_ten"] <= 6


def test_numbers_of_stops_are_compared_on_every_exit(tiny_layerwise_path, tmp_path, one_thread, monkeypatch):
    judgements = [("q1", "p2", 1), ("q3", "p5", 1)]
    candidates = from_bm25(read_collection(write_collection(tmp_path, judgements=judgements), "train"), 8)
    reranker = MatryoshkaReranker(tiny_layerwise_path, dtype="float32", devices="cpu")
    reranker.model._use_exits([3, 6])
    reranker.config = reranker.model.config
    expected = reranker.compute_score(("wing", "lift"), cutoff_layers=[3, 6])
    deadlines.use_every_exit(reranker)
    assert reranker.config.exit_layers == [3, 4, 5, 6]
    assert reranker.compute_score(("wing", "lift"), cutoff_layers=[3, 6]) == expected
    monkeypatch.setattr(deadlines, "COMPARED_SHARES", (99,))  # enough time for every stop
    full, few, many = deadlines.measure(reranker, candidates, [2, 99])
    assert (few["stops"], many["stops"], full["cutoff_layers"]) == (2, 99, 6)
    # With time for all work every candidate reaches the deepest exit, whatever the stops.
    assert few["exit_of_all"] == many["exit_of_all"] == 6 and many["change"] == 0 and many["p"] == 1
    assert "| in " in deadlines.table([full, few, many]) and "+0.0000" in deadlines.table([many])


def test_a_way_says_how_good_and_how_late_its_rankings_are(tmp_path):
    judgements = [("q1", "p2", 1), ("q3", "p5", 1), ("q2", "p7", 1)]
    candidates = from_bm25(read_collection(write_collection(tmp_path, judgements=judgements), "train"), 3)
    way = deadlines.Way(
        {"deadline_ms": 20.0},
        rankings={"q1": ["p2", "p1"], "q3": ["p4", "p5"], "q2": ["p1", "p3"]},
        exits={"q1": [4, 2], "q3": [2, 2], "q2": [6, 3]},
        milliseconds=[50.0, 30.0, 10.0],
    )
    summary = way.summary(candidates)
    assert summary.pop("nDCG@10") == pytest.approx((1 + 0.6309 + 0) / 3, abs=1e-4)
    assert summary == {
        "deadline_ms": 20.0,
        "milliseconds": 30.0,
        "exit_of_first_ten": 3.2,
        "exit_of_all": 3.2,
        "stops": 7,
        "late": 2,
        "late_behind_first_exit": 1,
        "latest_behind_first_exit_milliseconds": 30.0,
    }
