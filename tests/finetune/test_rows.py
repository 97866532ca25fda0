import json
import os
from collections import Counter

import pytest

from flagembedding_matryoshka.finetune import MatryoshkaDataArguments
from flagembedding_matryoshka.finetune.rows import load_files, load_rows, mix_rows, sample_rows
from flagembedding_matryoshka.finetune.sources import source_files
from tests.lines import ROW, write


def load(path, kind="labels", **options):
    return load_rows(str(path), kind, str(path.parent / "cache"), **options)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{", "not JSON"),
        ("[1]", r"a row must be a JSON object, got \[1\]"),
        ({**ROW, "query": 3}, "query must be a string, got 3"),
        ({"query": "q", "neg": ["n"]}, "pos must be a list of at least one string, got None"),
        ({**ROW, "pos": []}, r"pos must be a list of at least one string, got \[\]"),
        ({**ROW, "neg": []}, r"neg must be a list of at least one string, got \[\]"),
        ({**ROW, "neg": ["n", None]}, "neg must be a list of at least one string"),
        ({**ROW, "neg_scores": [1.0]}, r"neg_scores must be a list of 2 numbers, one for each of neg, got \[1.0\]"),
        ({**ROW, "prompt": 5}, "prompt must be a string where it is given, got 5"),
        ({**ROW, "pos_scores": ["x"]}, r"pos_scores must be numbers, got \['x'\]"),
        ({**ROW, "pos_scores": [float("nan")]}, r"pos_scores must be numbers, got \[nan\]"),
        ({**ROW, "pos_scores": [10**400]}, r"pos_scores must be numbers, got \[1000"),
        ({**ROW, "pos_scores": [True]}, r"pos_scores must be numbers, got \[True\]"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, row, fault):
    path = write(tmp_path / "bad.jsonl", ROW, "", row)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: {fault}"):
        load(path)


def test_scores_may_be_missing_only_where_no_method_needs_them(tmp_path):
    path = write(tmp_path / "plain.jsonl", {"query": "q", "pos": ["p"], "neg": ["n"]})
    assert len(load(path)) == 1
    with pytest.raises(ValueError, match=r"line 1: pos_scores is missing\. .*--train_method normal"):
        load(path, "scores")


GRADED = {"query": "q", "passages": ["a", "b", "c"], "labels": [0, 2, 1]}


def test_rows_with_labels_are_split_into_positives_with_grades_and_negatives(tmp_path):
    plain = {"query": "q", "pos": ["p"], "neg": ["n"], "pos_labels": [2]}
    path = write(tmp_path / "rows.jsonl", {**GRADED, "scores": [0.1, 0.2, 0.3]}, {**ROW, "pos_labels": None})
    rows = load(path, "scores")
    assert (rows["pos"][0], rows["neg"][0], rows["pos_labels"][:]) == (["b", "c"], ["a"], [[2.0, 1.0], [1.0]])
    assert (rows["pos_scores"][0], rows["neg_scores"][0]) == ([0.2, 0.3], [0.1])
    assert load(write(tmp_path / "plain.jsonl", plain))["pos_labels"][:] == [[2.0]]
    assert load(write(tmp_path / "lists.jsonl", GRADED), "passages")["passages"][:] == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("row", "kind", "fault"),
    [
        ({**GRADED, "pos": ["a"]}, "labels", "a row with labels has passages, and no pos"),
        ({"query": "q", "labels": [1]}, "labels", "passages must be a list of at least two strings, got None"),
        ({**GRADED, "labels": [1, 0]}, "labels", r"labels must be a list of 3 numbers, one for each of passages, got"),
        ({**GRADED, "labels": [1, 0, None]}, "labels", "labels must be a list of 3 numbers"),
        ({**GRADED, "labels": [0, -1, 0]}, "labels", "labels must have a value above 0, and one of 0 or below"),
        ({**GRADED, "labels": [1, 2, 1]}, "labels", "labels must have a value above 0, and one of 0 or below"),
        (GRADED, "scores", "scores is missing. `flagembedding-matryoshka teach` adds scores"),
        ({**GRADED, "scores": [1, 2]}, "labels", r"scores must be a list of 3 numbers, one for each of passages"),
        ({**ROW, "pos_labels": [0]}, "labels", r"pos_labels must be a list of 1 numbers above 0, one for each of pos"),
        ({**ROW, "pos_labels": [1, 1]}, "labels", r"pos_labels must be a list of 1 numbers above 0"),
    ],
)
def test_faults_of_labels_are_named(row, kind, fault, tmp_path):
    with pytest.raises(ValueError, match=f"line 1: {fault}"):
        load(write(tmp_path / "bad.jsonl", row), kind)


def test_rows_without_labels(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"query": "q", "passages": ["a", "b"]}, ROW)
    assert load(path, "passages")["passages"][:] == [["a", "b"], ["p", "n", "m"]]
    with pytest.raises(ValueError, match="line 1: pos must be a list of at least one string, got None"):
        load(path)
    for row, fault in (
        ({"query": "q", "passages": ["a"]}, r"passages must be a list of at least two strings, got \['a'\]"),
        ({"query": "q"}, "pos must be a list of at least one string, got None; or passages, a list of at least two"),
    ):
        with pytest.raises(ValueError, match=f"line 1: {fault}"):
            load(write(tmp_path / "bad.jsonl", row), "passages")


def test_negatives_may_be_missing_where_all_are_drawn_from_other_rows(tmp_path):
    row = {"query": "q", "pos": ["p"], "neg": []}
    path = write(tmp_path / "rows.jsonl", {**row, "pos_scores": [1.0]}, {**row, "pos_scores": [2.0], "neg_scores": []})
    for kind in ("labels", "scores"):
        with pytest.raises(ValueError, match=r"line 1: neg must be a list of at least one string, got \[\]"):
            load(path, kind)
        assert load(path, kind, min_negatives=0)["neg"][:] == [[], []]
    assert load(path, "scores", min_negatives=0)["neg_scores"][:] == [[], []]
    assert load(path, "passages", min_negatives=0)["passages"][:] == [["p"], ["p"]]
    for bad, fault in (
        (row, "pos_scores is missing"),
        ({**row, "pos_scores": [1.0], "neg_scores": [1.0]}, r"neg_scores must be a list of 0 numbers.* got \[1.0\]"),
        ({**ROW, "neg_scores": None}, "neg_scores is missing"),
        ({**ROW, "neg": None}, "neg must be a list of strings, got None"),
    ):
        with pytest.raises(ValueError, match=f"line 1: {fault}"):
            load(write(tmp_path / "bad.jsonl", bad), "scores", min_negatives=0)


def test_files_and_directories(tmp_path):
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", "readme.txt", ".hidden.jsonl", "d.gz", "e.parquet"):
        write(tmp_path / name, ROW)
    (tmp_path / "folder.jsonl").mkdir()
    found = [str(tmp_path / name) for name in ("a.json", "b.jsonl", "c.jsonl.gz", "e.parquet")]
    assert source_files([str(tmp_path), "dataset:a/b:test"]) == [*found, "dataset:a/b:test"]
    assert source_files([str(tmp_path / ".hidden.jsonl")]) == [str(tmp_path / ".hidden.jsonl")]
    with pytest.raises(FileNotFoundError, match=r"no training data at .*missing"):
        source_files([str(tmp_path / "missing")])
    with pytest.raises(ValueError, match=r"the name of .*readme\.txt does not end with \.json, \.jsonl or \.parquet"):
        source_files([str(tmp_path / "readme.txt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no"):
        source_files([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="train_data is empty"):
        MatryoshkaDataArguments(train_data=[])


@pytest.mark.parametrize(
    "name", ["a[0-9].jsonl", "wh?t.jsonl", "*.jsonl", "a::b#c.jsonl", "two words.json", ".x.jsonl"]
)
def test_a_name_is_a_name_and_no_pattern(name, tmp_path):
    folder = tmp_path / "[x] ?"
    folder.mkdir()
    path = write(folder / name, {**ROW, "query": name})
    for other in ("a1.jsonl", "what.jsonl"):
        write(folder / other, {**ROW, "query": "other"})
    assert load(path)["query"][:] == [name]


def test_forms_of_a_file_give_the_same_rows(tmp_path):
    rows = [{**ROW, "query": f"Größe {number}"} for number in range(3)]
    expected = load(write(tmp_path / "plain.jsonl", *rows), "scores")[:]
    for name, data in {
        "array.json": json.dumps(rows, indent=2).encode(),
        "utf16.jsonl": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-16"),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert load(tmp_path / name, "scores")[:] == expected


def test_bad_lines_are_left_out_where_that_is_asked_for_and_counted(tmp_path, caplog):
    path = write(tmp_path / "bad.jsonl", ROW, "{", {**ROW, "pos": []}, {**ROW, "query": "last"})
    with path.open("ab") as file:
        file.write('{"query": "Größe"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not JSON .* \(3 of 5 lines are wrong\)"):
        load(path)
    assert load(path, skip_bad_lines=True)["query"][:] == ["q", "last"]
    assert "3 bad lines are left out, 2 are kept. line 2: not JSON" in caplog.text


def test_a_file_is_parsed_once_until_it_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", ROW)
    load(path)
    parsed = []
    monkeypatch.setattr(
        "flagembedding_matryoshka.finetune.rows.row_fault", lambda row, **options: parsed.append(row["query"])
    )
    load(path)
    assert parsed == []
    write(path, {**ROW, "query": "a"}, {**ROW, "query": "b"})
    assert load(path)["query"][:] == ["a", "b"]


def test_a_cache_that_cannot_be_written_to_is_named_with_what_to_do(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROW)
    (tmp_path / "cache").write_text("a file where no directory can be made")
    with pytest.raises(OSError, match=r"rows.jsonl is parsed once, into .*cache, where nothing .* by --cache_path or"):
        load(path)


def test_the_cache_of_one_file_is_not_taken_for_that_of_another(tmp_path):
    first, second = (write(tmp_path / f"{name}.jsonl", {**ROW, "query": name}) for name in "ab")
    os.utime(second, ns=(os.stat(first).st_atime_ns, os.stat(first).st_mtime_ns))
    assert [load(path)["query"][0] for path in (first, second)] == ["a", "b"]
    assert set(load(first).column_names) & {"pos_scores", "neg_scores"} == set()
    assert load(first, "scores")["pos_scores"][:] == [[1.0]]


def test_files_without_a_row(tmp_path):
    empty, full = write(tmp_path / "a.jsonl", ""), write(tmp_path / "b.jsonl", ROW)
    assert [len(rows) for rows in load_files([str(empty), str(full)], "labels", str(tmp_path))] == [0, 1]
    with pytest.raises(ValueError, match=r"there is no row in .*a\.jsonl"):
        load_files([str(empty)], "labels", str(tmp_path))


def test_rows_are_mixed_in_the_proportion_of_weights(tmp_path):
    files = [
        load(write(tmp_path / f"{name}.jsonl", *({**ROW, "query": f"{name} {number}"} for number in range(size))))
        for name, size in (("a", 30), ("b", 10))
    ]
    few, many = (rows["query"][:] for rows in mix_rows(files, [1.0, 3.0], seed=1))
    assert (len(few), len(set(few)), len(many)) == (10, 10, 30)
    assert Counter(many) == {f"b {number}": 3 for number in range(10)}
    assert mix_rows(files, [1.0, 3.0], seed=1)[0]["query"][:] == few
    assert mix_rows(files, [1.0, 3.0], seed=2)[0]["query"][:] != few
    with pytest.raises(ValueError, match=r"file at place 1 .* has a weight and no row"):
        mix_rows([files[0], files[1].select([])], [1.0, 1.0], seed=1)


def test_drawn_rows_do_not_depend_on_the_directory(tmp_path):
    rows = load(write(tmp_path / "rows.jsonl", *({**ROW, "query": f"q {number}"} for number in range(50))))
    drawn = [
        sample_rows(rows, path, 5, seed)["query"][:] for path, seed in (("a/x.jsonl", 1), ("/b/x.jsonl", 1), ("x", 2))
    ]
    assert len(drawn[0]) == 5 and drawn[0] == drawn[1] != drawn[2]
