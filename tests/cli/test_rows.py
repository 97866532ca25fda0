import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagembedding_matryoshka.cli.rows import as_list, as_pair, first_stage_scores, read

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
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
        (as_pair, '{"query": "q"}', "one of passage and document is wanted, got the names ['query']"),
        (as_pair, '{"query": "q", "passage": "p", "document": "d"}', "one of passage and document is wanted"),
        (as_pair, '{"query": 1, "passage": "p"}', "query must be a string, got 1"),
        (as_pair, '{"passage": "p"}', "query must be a string, got None"),
        (as_pair, '{"query": "q", "passage": null}', "passage must be a string, got None"),
        (as_pair, '["q"]', "a query and a passage are wanted, got 1 values: ['q']"),
        (as_pair, '["q", "p", "r"]', "got 3 values"),
        (as_pair, '["q", 3]', "passage must be a string, got 3"),
        (as_pair, '"q"', "an object or an array is wanted, got 'q'"),
        (as_pair, '{"query": "q",', "not JSON"),
        (as_pair, '{"query": "q", "passage": "\\ud83d"}', "half a surrogate pair"),
        (as_list, '{"query": "q", "documents": "d"}', "documents must be a list, got 'd'"),
        (
            as_list,
            '{"query": "q", "passages": ["d", 1]}',
            "document 1 must be a string or an object with a text, got 1",
        ),
        (as_list, '{"query": "q", "documents": [{"id": 1}]}', "document 0 must be a string or an object with a text"),
        (as_pair, '{"query": "q", "passage": "p", "weight": NaN}', "NaN and infinity are no numbers of JSON"),
        (as_list, '{"query": "q", "documents": [{"text": "d", "x": [-Infinity]}]}', "NaN and infinity are no numbers"),
        (as_list, "[]", "a query and its documents are wanted, got an empty array"),
        (as_list, "3", "an object or an array is wanted, got 3"),
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
    with pytest.raises(ValueError, match=r"rows\.tsv, line 2: a query and a passage are wanted, got 1 values: \['q'\]"):
        list(read(written(path, "q\tp", "q"), as_pair))
    path.write_bytes("q\tö\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.tsv, line 1: not UTF-8"):
        list(read(path, as_pair))


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
