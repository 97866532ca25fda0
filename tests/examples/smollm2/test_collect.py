import json
import subprocess
import sys

import collect
import pytest
from collection import counts, in_dev, is_complete, write_collection
from docstrings import Pair, split

from flagembedding_matryoshka.text.collections import read_collection


def pairs(count):
    return [Pair(f"what is item{i}", f"item{i} is the thing that has the number {i} of them all") for i in range(count)]


def test_a_written_collection_is_read(tmp_path):
    assert write_collection(tmp_path, pairs(500), 300, 1)
    train, dev = (read_collection(tmp_path, name) for name in ("train", "dev"))
    assert len(train.queries) == 300 == len(train.relevant) + len(dev.relevant)
    assert len(train.passages) == 480 and 2 < len(dev.relevant) < 30
    for query, (passage,) in train.relevant.items():
        item = train.passages[passage].split()[0]
        assert item[:4] == "item" and (item[4:] in train.queries[query])
    assert counts(tmp_path)["passages"] == 480


def test_the_same_seed_writes_the_same_and_the_order_of_the_pairs_does_not_matter(tmp_path):
    for name, rows, seed in (("a", pairs(99), 1), ("b", pairs(99)[::-1], 1), ("c", pairs(99), 2)):
        write_collection(tmp_path / name, rows, 50, seed)
    first, second, third = (
        [(tmp_path / name / file).read_text() for file in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv")]
        for name in "abc"
    )
    assert first == second != third


def test_no_query_and_no_passage_is_there_twice(tmp_path):
    rows = [*pairs(20), *(Pair(pair.query.upper(), f"Another {pair.passage}") for pair in pairs(20))]
    write_collection(tmp_path, rows, 100, 1)
    assert counts(tmp_path)["passages"] == 20


def test_the_split_does_not_depend_on_the_rest_or_on_the_seed():
    left = split(pairs(5000)).train
    assert 0.03 < sum(in_dev(pair.query) for pair in left) / len(left) < 0.05
    assert in_dev("What is item7?") == in_dev("what is item7")


def test_what_the_demo_reports_on_is_no_source(tmp_path, monkeypatch):
    everything = pairs(300)
    monkeypatch.setattr(collect, "collect_pairs", lambda: everything)
    sources = collect.Sources(1, tmp_path)
    held_out = {pair.query for pair in split(everything).held_out}
    assert sources.reported == held_out and held_out
    assert held_out.isdisjoint(pair.query for pair in sources.docstrings) and len(sources.docstrings) > 250


def test_what_is_missing_is_left_out_and_what_is_complete_is_not_collected_again(tmp_path, monkeypatch, capsys):
    kinds = {"some": lambda sources: pairs(200), "none": lambda sources: []}
    monkeypatch.setattr(collect, "KINDS", kinds)
    arguments = ["collect.py", "--output", str(tmp_path), "--limit", "100", "--kinds", "some", "none"]
    monkeypatch.setattr(sys, "argv", arguments)
    collect.main()
    assert "none: left out" in capsys.readouterr().out
    assert is_complete(tmp_path / "some") and not (tmp_path / "none").exists()
    summary = json.loads((tmp_path / "collect.json").read_text())
    assert summary["kinds"]["some"]["passages"] == 160 and "python numpy" in summary["sources"]
    kinds["some"] = lambda sources: pytest.fail("collected again")
    collect.main()


def test_the_command_tells_its_options():
    done = subprocess.run([sys.executable, collect.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "--output" in done.stdout and "--limit" in done.stdout
