import pytest

from flagembedding_matryoshka.mining.bm25 import BM25
from flagembedding_matryoshka.text.collections import read_collection
from tests.collection import CORPUS


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ({"corpus": [CORPUS[2], "", "{"]}, r"corpus\.jsonl, line 3: not JSON"),
        (
            {"corpus": [CORPUS[2], {"_id": 3, "text": "x"}]},
            r"corpus\.jsonl, line 2: a row must have the strings _id and",
        ),
        ({"corpus": [CORPUS[2], "[1]"]}, r"corpus\.jsonl, line 2: a row must be a JSON object, got \[1\]"),
        ({"corpus": [CORPUS[2], '{"_id": "x", "text": "\\ud83d"}']}, r"corpus\.jsonl, line 2: half a surrogate pair"),
        (
            {"corpus": [CORPUS[2], {"_id": "x", "text": 3}]},
            r"corpus\.jsonl, line 2: a row must have the strings _id and",
        ),
        ({"corpus": [{"_id": "p2", "title": 5, "text": "x"}]}, r"corpus\.jsonl, line 1: title must be a string, got 5"),
        ({"corpus": [CORPUS[2], CORPUS[2]]}, r"corpus\.jsonl, line 2: the _id 'p2' occurs twice"),
        (
            {"queries": [{"_id": "q1", "text": "wing", "instruction": 5}]},
            r"queries\.jsonl, line 1: instruction must be a string, got 5",
        ),
        ({"queries": [{"_id": "q1"}]}, r"queries\.jsonl, line 1: a row must have the strings _id and text"),
        ({"header": "q1\tp2\t1"}, r"train\.tsv, line 1: the header must be \['query-id', .*got \['q1', 'p2', '1'\]"),
        (
            {"judgements": [("q1", "p2")]},
            r"train\.tsv, line 2: a row must be query-id, corpus-id and an int score, got \['q1', 'p2'\]",
        ),
        (
            {"judgements": [("q1", "p2", 1), ("q1", "p2", "²")]},
            r"train\.tsv, line 3: a row must be query-id, .*an int score.*²",
        ),
        ({"judgements": [("q9", "p2", 1)]}, r"train\.tsv, line 2: queries\.jsonl has no query 'q9'"),
        (
            {"judgements": [("q1", "p2", 1), ("", ""), ("q9", "p1", 1)]},
            r"train\.tsv, line 4: queries\.jsonl has no query 'q9'",
        ),
        (
            {"judgements": [("q1", "p2", 1), ("q1", "p2", 2)]},
            r"train\.tsv, line 3: 'p2' has grade 2 for 'q1', and 1 above",
        ),
        (
            {"judgements": [("q1", "p2", 0), ("q1", "p2", 1)]},
            r"train\.tsv, line 3: 'p2' has grade 1 for 'q1', and 0 above",
        ),
        (
            {"judgements": [("q1", "p2", 2), ("q1", "p2", -1)]},
            r"train\.tsv, line 3: 'p2' has grade -1 for 'q1', and 2 above",
        ),
        ({"judgements": []}, r"train\.tsv has no relevant passage: no score is above 0"),
        ({"judgements": [("q1", "p2", 0), ("q1", "p3", -1)]}, r"train\.tsv has no relevant passage"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(collection, part, fault):
    directory = collection(**part)
    with pytest.raises(ValueError, match=fault):
        read_collection(directory, "train")


def test_an_instruction_belongs_to_its_query(collection):
    queries = [{"_id": "q1", "text": "wing", "instruction": "judge by the topic"}, {"_id": "q2", "text": "heat"}]
    assert read_collection(collection(queries=queries), "train").instructions == {"q1": "judge by the topic"}


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
    judgements = [("q1", "p2", 2), ("q3", "p1", 1), ("q1", "p0", 0), ("q1", "p2", 2), ("q1", "p3", -1), ("q1", "p0", 0)]
    read = read_collection(collection(judgements=judgements), "train")
    assert read.relevant == {"q1": {"p2": 2}, "q3": {"p1": 1}} and read.irrelevant == {"q1": {"p0": 0, "p3": -1}}


def test_marks_and_line_ends_of_other_systems_are_no_fault(collection):
    directory = collection(judgements=[("q1", "p2", 2)])
    expected = read_collection(directory, "train")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        text = (directory / name).read_text(encoding="utf-8")
        (directory / name).write_bytes(text.replace("\n", "\r\n").encode("utf-16"))
    assert read_collection(directory, "train") == expected


def test_a_judged_passage_that_is_missing_is_counted_and_stays(collection, caplog):
    read = read_collection(collection(judgements=[("q1", "p2", 1), ("q1", "p9", 2), ("q3", "p9", 1)]), "train")
    assert read.relevant == {"q1": {"p2": 1, "p9": 2}, "q3": {"p9": 1}}
    assert "1 of 2 relevant passages are not in the corpus, such as 'p9'" in caplog.text


def test_a_query_is_itself_by_id_and_text(collection):
    corpus = [{"_id": "q1", "title": "On wings", "text": "wing"}, {"_id": "q3", "text": "a cone"}]
    read = read_collection(collection(corpus=corpus, judgements=[("q1", "q3", 1)]), "train")
    assert [read.is_itself(*names) for names in (("q1", "q1"), ("q3", "q3"), ("q1", "q3"), ("q2", "q2"))] == [
        True, False, False, False,
    ]  # fmt: skip


def test_a_passage_that_is_judged_relevant_is_never_the_query_itself(collection):
    corpus = [{"_id": "q1", "text": "wing"}, {"_id": "q3", "text": "the heat"}]
    read = read_collection(collection(corpus=corpus, judgements=[("q1", "q1", 1), ("q3", "q1", 1)]), "train")
    assert not read.is_itself("q1", "q1") and read.is_itself("q3", "q3")


@pytest.mark.parametrize("texts", [["the", "a", ""], [""], []])
def test_passages_without_a_word_are_named(texts):
    with pytest.raises(ValueError, match=f"BM25 finds no word to index in {len(texts)} passages"):
        BM25(texts)
