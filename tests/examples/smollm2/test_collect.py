import json
import lzma
import re
import subprocess
import sys

import collect
import collection
import pytest
from collection import counts, distinct, is_complete, split_of, write_collection
from docstrings import Pair, split

from flagembedding_matryoshka.text.collections import read_collection


def pairs(count):
    return [Pair(f"what is item{i}", f"item{i} is the thing that has the number {i} of them all") for i in range(count)]


def test_a_written_collection_is_read(tmp_path):
    assert write_collection(tmp_path, pairs(600), 300, 1)
    splits = {name: read_collection(tmp_path, name) for name in ("train", "dev", "test")}
    train, dev, test = (set(splits[name].relevant) for name in ("train", "dev", "test"))
    assert len(train) == 300 and 2 < len(dev) < 30 and 2 < len(test) < 30
    assert not train & dev and not train & test and not dev & test
    written = splits["train"]
    assert len(written.passages) == len(train | dev | test) + 180
    for query, (passage,) in written.relevant.items():
        item = written.passages[passage].split()[0]
        assert item[:4] == "item" and (item[4:] in written.queries[query])
    assert counts(tmp_path)["test_queries"] == len(test)


def test_held_out_splits_are_capped(tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "MOST_HELD_OUT", 5)
    write_collection(tmp_path, pairs(900), 100, 1)
    assert (counts(tmp_path)["dev_queries"], counts(tmp_path)["test_queries"]) == (5, 5)


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


def test_near_duplicates_are_left_out():
    common = " ".join(f"word{number}" for number in range(60))
    first = Pair("what is first", f"first {common} {' '.join(f'own{number}' for number in range(20))}")
    second = Pair("what is second", f"second {common}")
    third = Pair("what is third", " ".join(f"other{number}" for number in range(60)))
    assert list(distinct([first, second, third])) == [first, third]


def test_the_split_does_not_depend_on_the_rest_or_on_the_seed():
    left = split(pairs(5000)).train
    for name in ("dev", "test"):
        assert 0.01 < sum(split_of(pair.query) == name for pair in left) / len(left) < 0.03
        assert 0.04 < sum(split_of(pair.query, 6) == name for pair in left) / len(left) < 0.08
    assert split_of("What is item7?") == split_of("what is item7")


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
    assert summary["kinds"]["some"]["passages"] >= 160 and "python numpy" in summary["sources"]
    kinds["some"] = lambda sources: pytest.fail("collected again")
    collect.main()


def test_the_command_tells_its_options():
    done = subprocess.run([sys.executable, collect.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "--output" in done.stdout and "--limit" in done.stdout


def write_texts(folder, name, rows):
    with lzma.open(folder / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_texts_of_a_folder_become_kinds(tmp_path, monkeypatch):
    subjects = [
        "lattice",
        "protein",
        "galaxy",
        "market",
        "neuron",
        "turbine",
        "polymer",
        "glacier",
        "compiler",
        "enzyme",
    ]
    verbs = ["bends", "absorbs", "predicts", "limits", "orders", "splits", "heats", "cools", "drives", "binds"]

    def sentence(number, part):
        one, two = subjects[number % 10], verbs[(number // 10 + part) % 10]
        return (
            f"The {one}{number} {two} the {subjects[part]}{number + part} when the field{number * part} of it is weak."
        )

    abstracts = [
        {"id": f"1234.{number}", "title": f"On {subjects[number % 10]}{number} and its rank", "category": "cs.IR",
         "abstract": " ".join(sentence(number, part) for part in range(1, 7))}
        for number in range(400)
    ]  # fmt: skip
    medical = [
        {"id": f"{number}", "type": "symptoms", "focus": f"illness{number}", "question": f"What is illness{number} ?",
         "answer": f"The illness{number} is an illness of the {subjects[number % 10]}{number} that is not rare in it."}
        for number in range(90)
    ]  # fmt: skip
    sections = [
        {"question": f"Who built tower{number}?", "article": f"Tower{number}", "section": "Abstract", "answers": [1],
         "sentences": [sentence(number, part) for part in range(1, 7)]}
        for number in range(90)
    ]  # fmt: skip
    for name, rows in (("arxiv", abstracts), ("medquad", medical), ("selqa", sections)):
        write_texts(tmp_path, name, rows)
    kinds = ["titles", "abstracts", "phrases", "notes", "medical", "wikipedia"]
    output = tmp_path / "out"
    command = ["collect.py", "--output", str(output), "--texts", str(tmp_path), "--limit", "50", "--kinds", *kinds]
    monkeypatch.setattr(sys, "argv", command)
    collect.main()
    seen = set()
    for kind in kinds:
        written = read_collection(output / kind, "train")
        assert len(written.relevant) > 10, kind
        for query, (passage,) in written.relevant.items():
            assert written.queries[query].lower() not in written.passages[passage].lower(), (kind, query)
        numbers = {re.search(r"\d+", text)[0] for text in written.passages.values()}
        if kind in ("titles", "abstracts", "phrases"):
            assert not numbers & seen, "an abstract belongs to one kind"
            seen |= numbers
