import pytest

from flagembedding_matryoshka.text.collections import read_collection
from tests.collection import CORPUS


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ({"corpus": [CORPUS[2], "", "{"]}, r"corpus\.jsonl, line 3: not JSON"),
        (
            {"corpus": [CORPUS[2], {"_id": 3, "text": "x"}]},
            r"corpus\.jsonl, line 2: an object with the strings _id and",
        ),
        ({"corpus": [CORPUS[2], "[1]"]}, r"corpus\.jsonl, line 2: an object is wanted, got \[1\]"),
        ({"corpus": [CORPUS[2], '{"_id": "x", "text": "\\ud83d"}']}, r"corpus\.jsonl, line 2: half a surrogate pair"),
        (
            {"corpus": [CORPUS[2], {"_id": "x", "text": 3}]},
            r"corpus\.jsonl, line 2: an object with the strings _id and",
        ),
        ({"corpus": [{"_id": "p2", "title": 5, "text": "x"}]}, r"corpus\.jsonl, line 1: title must be a string, got 5"),
        ({"corpus": [CORPUS[2], CORPUS[2]]}, r"corpus\.jsonl, line 2: _id 'p2' is there twice"),
        ({"queries": [{"_id": "q1"}]}, r"queries\.jsonl, line 1: an object with the strings _id and text is wanted"),
        ({"header": "q1\tp2\t1"}, r"train\.tsv, line 1: the header must be \['query-id', .*got \['q1', 'p2', '1'\]"),
        ({"judgements": [("q1", "p2")]}, r"train\.tsv, line 2: query-id, corpus-id and .* wanted, got \['q1', 'p2'\]"),
        ({"judgements": [("q1", "p2", 1), ("q1", "p2", "²")]}, r"train\.tsv, line 3: query-id, .*a whole score.*²"),
        ({"judgements": [("q9", "p2", 1)]}, r"train\.tsv, line 2: there is no query 'q9'"),
        ({"judgements": [("q1", "p2", 1), ("", ""), ("q1", "p9", 1)]}, r"train\.tsv, line 4: there is no passage 'p9'"),
        (
            {"judgements": [("q1", "p2", 1), ("q1", "p2", 2)]},
            r"train\.tsv, line 3: 'p2' has grade 2 for 'q1', and 1 above",
        ),
        ({"judgements": []}, r"train\.tsv names no relevant passage: no score is above 0"),
        ({"judgements": [("q1", "p2", 0), ("q1", "p3", -1)]}, r"train\.tsv names no relevant passage"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(collection, part, fault):
    directory = collection(**part)
    with pytest.raises(ValueError, match=fault):
        read_collection(directory, "train")


def test_blank_lines_and_quotes_are_no_fault(collection):
    corpus = [{"_id": '"a', "text": "wing lift"}, "", *CORPUS]
    read = read_collection(collection(corpus, judgements=[("q1", '"a', 1), ("   ",), ("q1", "p3", 1)]), "train")
    assert read.relevant == {"q1": {'"a': 1, "p3": 1}}


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
def test_a_missing_file_is_named(collection, name):
    directory = collection()
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_collection(directory, "train")


def test_grades_are_kept_and_a_repetition_is_no_fault(collection):
    judgements = [("q1", "p2", 2), ("q3", "p1", 1), ("q1", "p0", 0), ("q1", "p2", 2)]
    assert read_collection(collection(judgements=judgements), "train").relevant == {"q1": {"p2": 2}, "q3": {"p1": 1}}


def test_marks_and_line_ends_of_other_systems_are_no_fault(collection):
    directory = collection(judgements=[("q1", "p2", 2)])
    expected = read_collection(directory, "train")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        text = (directory / name).read_text(encoding="utf-8")
        (directory / name).write_bytes(text.replace("\n", "\r\n").encode("utf-16"))
    assert read_collection(directory, "train") == expected
