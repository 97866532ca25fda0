import csv
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagembedding_matryoshka.cli.rows import as_list, as_pair, first_stage_scores, read

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
IN_A_CELL = st.text(st.one_of(st.characters(exclude_categories=["Cs", "Cc"]), st.sampled_from('",\n\t')), max_size=20)
IN_A_TABLE = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


def written(path, *lines):
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1))
def test_objects_and_arrays_are_read_as_they_were_written(tmp_path_factory, pairs):
    directory = tmp_path_factory.mktemp("rows")
    rows = [{"query": query, "passage": passage} for query, passage in pairs]
    for name in ("rows.jsonl", "rows"):
        for values in (rows, pairs):
            assert list(read(written(directory / name, *map(json.dumps, values)), as_pair)) == rows
    assert list(read(written(directory / "rows.json", json.dumps(rows)), as_pair)) == rows


@given(st.lists(st.lists(IN_A_TABLE, min_size=2, max_size=4), min_size=1))
def test_texts_between_tabs_are_read_as_they_were_written(tmp_path_factory, rows):
    path = written(tmp_path_factory.mktemp("rows") / "rows.tsv", *map("\t".join, rows))
    found = [row for row in rows if not "\t".join(row).isspace()]
    assert list(read(path, as_list)) == [{"query": query, "documents": texts} for query, *texts in found]


def test_what_a_file_without_a_suffix_begins_with_says_what_it_is(tmp_path):
    path = tmp_path / "rows"
    assert list(read(written(path, "", "a\t[b"), as_pair)) == [{"query": "a", "passage": "[b"}]
    assert list(read(written(path, '["a", "b"]'), as_pair)) == [{"query": "a", "passage": "b"}]
    assert list(read(written(path), as_pair)) == []
    with pytest.raises(ValueError, match="line 1: not JSON"):
        list(read(written(path, "[a\tb"), as_pair))
    assert list(read(written(tmp_path / "rows.tsv", "[a\tb"), as_pair)) == [{"query": "[a", "passage": "b"}]


@pytest.mark.parametrize(
    ("as_row", "line", "fault"),
    [
        (as_pair, '{"query": "q"}', "a row must have either passage or document, got the names ['query']"),
        (as_pair, '{"query": "q", "passage": "p", "document": "d"}', "a row must have either passage or document"),
        (as_pair, '{"query": 1, "passage": "p"}', "query must be a string, got 1"),
        (as_pair, '{"passage": "p"}', "query must be a string, got None"),
        (as_pair, '{"query": "q", "passage": null}', "passage must be a string, got None"),
        (as_pair, '["q"]', "a row must be a query and a passage, got 1 values: ['q']"),
        (as_pair, '["q", "p", "r"]', "got 3 values"),
        (as_pair, '["q", 3]', "passage must be a string, got 3"),
        (as_pair, '"q"', "a row must be an object or an array, got 'q'"),
        (as_pair, '{"query": "q",', "not JSON"),
        (as_pair, '{"query": "q", "passage": "\\ud83d"}', "half a surrogate pair"),
        (as_list, '{"query": "q", "documents": "d"}', "documents must be a list, got 'd'"),
        (
            as_list,
            '{"query": "q", "passages": ["d", 1]}',
            "document 1 must be a string or an object with a text, got 1",
        ),
        (as_list, '{"query": "q", "documents": [{"id": 1}]}', "document 0 must be a string or an object with a text"),
        (as_pair, '{"query": "q", "passage": "p", "weight": NaN}', "NaN and infinity are not JSON numbers"),
        (
            as_list,
            '{"query": "q", "documents": [{"text": "d", "x": [-Infinity]}]}',
            "NaN and infinity are not JSON numbers",
        ),
        (as_list, "[]", "a row must be a query and its documents, got an empty array"),
        (as_list, "3", "a row must be an object or an array, got 3"),
    ],
)
def test_a_line_that_is_wrong_is_named(as_row, line, fault, tmp_path):
    good = '["q", "d"]'
    path = written(tmp_path / "rows.jsonl", good, "", line)
    with pytest.raises(ValueError) as raised:
        list(read(path, as_row))
    assert str(raised.value).startswith(f"{path}, line 3: ") and fault in str(raised.value)


def test_a_line_of_a_table_that_is_wrong_is_named(tmp_path):
    path = tmp_path / "rows.tsv"
    with pytest.raises(ValueError, match=r"rows\.tsv, line 2: no tab separates a query from its texts"):
        list(read(written(path, "q\tp", "q"), as_pair))
    path.write_bytes("q\tö\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.tsv, line 1: not UTF-8"):
        list(read(path, as_pair))


def test_a_table_without_a_tab_is_refused(tmp_path):
    path = written(tmp_path / "lists.txt", "a query", "another query")
    with pytest.raises(ValueError, match=r"lists\.txt, line 1: no tab separates a query from its texts"):
        list(read(path, as_list))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.tsv", "rows.csv", "rows"])
def test_a_file_may_be_compressed(name, tmp_path):
    lines = {
        "rows.json": ['[{"query": "ä", "passage": "p"}]'],
        "rows.tsv": ["ä\tp"],
        "rows.csv": ["passage,query", "p,ä"],
    }.get(name, ['{"query": "ä", "passage": "p"}'])
    path = written(tmp_path / name, *lines)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read(packed, as_pair)) == list(read(path, as_pair)) == [{"query": "ä", "passage": "p"}]


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:12] + b"\xff" * 9 + data[21:]])
def test_a_damaged_compressed_file_is_named(damage, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'["q", "p"]\n' * 1000)))
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz is compressed by gzip and damaged"):
        list(read(path, as_pair))


@given(st.lists(st.tuples(IN_A_CELL, IN_A_CELL, IN_A_CELL), min_size=1))
def test_csv_is_read_as_it_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("id", "query", "passage"), *rows])
    names = ("id", "query", "passage")
    assert list(read(path, as_pair)) == [dict(zip(names, row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["wing,air"], r"line 1: the header must name each column once, query among them, got \['wing', 'air'\]"),
        (["query,passage,passage"], "line 1: the header must name each column once"),
        (["query,passage", '"a', 'b","c"', "d"], "line 4: 1 cells for 2 columns"),
        (["query,passage", 'a,"b"c'], "line 2: not CSV"),
        (["query,text", "a,b"], "line 2: a row must have either passage or document, got the names"),
    ],
)
def test_a_fault_of_csv_is_named(lines, fault, tmp_path):
    with pytest.raises(ValueError, match=rf"rows\.csv, {fault}"):
        list(read(written(tmp_path / "rows.csv", *lines), as_pair))


def test_empty_csv_has_no_rows(tmp_path):
    assert list(read(written(tmp_path / "rows.csv"), as_pair)) == []


DOCUMENTS = ["a", {"text": "b", "bm25": 3}, {"text": "c", "bm25": None}, {"text": "d"}, {"text": "e", "bm25": -0.5}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"documents": DOCUMENTS}, [None, 3.0, None, None, -0.5]),
        ({"passages": ["a", {"text": "b"}], "bm25": [1, None]}, [1.0, None]),
        ({"documents": []}, []),
        ({"documents": [], "bm25": []}, []),
    ],
)
def test_first_stage_scores_come_from_documents_or_from_the_row(row, expected):
    assert first_stage_scores(as_list({"query": "q"} | row), "bm25") == expected


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"documents": ["a", {"text": "b", "bm52": 1}]}, "neither the row nor one of its documents has .* in 'bm25'"),
        ({"documents": DOCUMENTS, "bm25": [1] * 5}, "the row and document 1 both have 'bm25'"),
        ({"documents": ["a", "b"], "bm25": [1]}, r"'bm25' must be a list of 2 scores, got \[1\]"),
        ({"documents": ["a", "b"], "bm25": {"a": 1}}, "'bm25' must be a list of 2 scores"),
        ({"documents": ["a", "b"], "bm25": [1, "2"]}, "'bm25': value 1 must be a number, or None, got '2'"),
        ({"documents": ["a", "b"], "bm25": [True, 1]}, "'bm25': value 0 must be a number"),
        ({"documents": ["a", {"text": "b", "bm25": "2"}]}, "'bm25' of document 1 must be a number, or None, got '2'"),
        ({"documents": ["a", {"text": "b", "bm25": 10**400}]}, "'bm25' of document 1 is 10+.*, but must be finite"),
    ],
)
def test_missing_or_invalid_first_stage_scores_are_refused(row, fault):
    with pytest.raises(ValueError, match=fault):
        first_stage_scores(as_list({"query": "q"} | row), "bm25")
