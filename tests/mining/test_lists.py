import json

import pytest

from flagembedding_matryoshka.finetune.rows import load_rows
from flagembedding_matryoshka.mining.lists import main
from tests.collection import CORPUS, QUERIES
from tests.encoders import save_bi_encoder


def passage(number):
    return f"{CORPUS[number]['title']} {CORPUS[number]['text']}".strip()


def made(directory, *more):
    output = directory.parent / "lists.jsonl"
    main(["--data", str(directory), "--output", str(output), *map(str, more)])
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture
def unjudged(collection):
    """A collection without judgements."""

    def write(**parts):
        directory = collection(**parts)
        (directory / "qrels" / "train.tsv").unlink()
        return directory

    return write


def test_lists_are_the_first_passages_best_first_without_the_query_itself(unjudged, caplog):
    wing, heat = made(unjudged(), "--top_k", 4)
    assert wing == {"query": "wing", "passages": [passage(number) for number in (1, 2, 3, 4)]}
    assert heat == {"query": "the heat", "passages": [passage(number) for number in (4, 5, 6, 7)]}
    assert "3 queries. Left out are queries that find fewer than 2 passages: 1" in caplog.text


def test_texts_that_come_again_are_one(unjudged):
    directory = unjudged(
        corpus=[*CORPUS, {"_id": "twin", "text": passage(3)}], queries=[*QUERIES, {"_id": "q9", "text": "wing"}]
    )
    rows = made(directory, "--top_k", 20)
    assert [row["query"] for row in rows] == ["wing", "the heat"]
    assert all(len(row["passages"]) == len(set(row["passages"])) for row in rows)


def test_a_list_keeps_the_instruction_of_its_query(unjudged):
    instructed = {**QUERIES[0], "instruction": "judge by the topic"}
    wing, heat = made(unjudged(queries=[instructed, *QUERIES[1:]]), "--top_k", 4)
    assert wing["instruction"] == "judge by the topic" and "instruction" not in heat
    with pytest.raises(ValueError, match="the query 'wing' has two instructions, 'judge by the topic' and 'by length'"):
        made(unjudged(queries=[instructed, {**QUERIES[0], "_id": "q9", "instruction": "by length"}]), "--top_k", 4)


def test_both_miners_find_passages_and_training_reads_them(unjudged, tmp_path):
    save_bi_encoder(tmp_path / "encoder")
    rows = made(unjudged(), "--miner", "both", "--bi_encoder", tmp_path / "encoder", "--top_k", 6)
    assert [row["query"] for row in rows] == [query["text"] for query in QUERIES]
    assert [len(row["passages"]) for row in rows] == [6, 6, 6]
    loaded = load_rows(str(tmp_path / "lists.jsonl"), "passages", str(tmp_path / "cache"))
    assert loaded["passages"][:] == [row["passages"] for row in rows]


def test_what_makes_no_list_is_refused(unjudged, tmp_path, capsys):
    with pytest.raises(ValueError, match="top_k is 1, but must be at least 2"):
        made(unjudged(), "--top_k", 1)
    with pytest.raises(
        ValueError,
        match=r"none of 1 queries has a training row\..* fewer than 2 passages: 1",
    ):
        made(unjudged(queries=[{"_id": "q", "text": "submarine"}]))
    assert not (tmp_path / "lists.jsonl").exists()
    with pytest.raises(SystemExit):
        made(unjudged(), "--miner", "both")
    assert "--miner both needs --bi_encoder" in capsys.readouterr().err


def test_test_queries_are_left_out_unless_they_are_asked_for(collection, caplog):
    judged = (("q1", "p2", 1), ("q2", "p3", 1), ("q3", "p5", 0))
    directory = collection(judgements=judged, queries=[*QUERIES, {"_id": "q9", "text": "wing"}])
    collection(judgements=(("q1", "p2", 1),), split="test", queries=[*QUERIES, {"_id": "q9", "text": "wing"}])
    caplog.set_level("INFO")
    assert [row["query"] for row in made(directory)] == ["the heat"]
    assert "1 of 3 queries are left out: they are in" in caplog.text
    assert [row["query"] for row in made(directory, "--include_test")] == ["wing", "the heat"]
    assert [row["query"] for row in made(directory, "--split", "test")] == ["wing"]
    assert [row["query"] for row in made(directory, "--split", "train")] == ["the heat"]
    with pytest.raises(FileNotFoundError, match=r"qrels/dev\.tsv"):
        made(directory, "--split", "dev")


def test_a_collection_of_test_queries_alone_is_refused(collection):
    directory = collection(judgements=[(query["_id"], "p2", 1) for query in QUERIES], split="test")
    with pytest.raises(ValueError, match=r"no query is left\. .* has 3 queries, and 3 of them .* --include_test"):
        made(directory)
