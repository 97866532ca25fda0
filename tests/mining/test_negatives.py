import json
import sys

import pytest

from flagembedding_matryoshka.finetune.rows import load_rows
from flagembedding_matryoshka.mining import bm25, resuming
from flagembedding_matryoshka.mining.negatives import main, mine
from flagembedding_matryoshka.mining.retrievers import BiEncoder, best_ranks
from flagembedding_matryoshka.mining.rows import write_rows
from flagembedding_matryoshka.text.collections import read_collection
from tests.collection import CORPUS, QUERIES
from tests.encoders import save_bi_encoder


def mined(directory, *more):
    output = directory.parent / "train.jsonl"
    main(["--data", str(directory), "--output", str(output), *map(str, more)])
    return [json.loads(line) for line in output.read_text().splitlines()]


def passage(number):
    return f"{CORPUS[number]['title']} {CORPUS[number]['text']}".strip()


def test_rows_are_flagembeddings(collection):
    directory = collection(judgements=[("q3", "p4", 1), ("q1", "p2", 2), ("q1", "p1", 1)])
    rows = mined(directory, "--first", 1, "--negatives", 8)
    assert [row["query"] for row in rows] == ["the heat", "wing"]
    assert [row["pos"] for row in rows] == [[passage(4)], [passage(2), passage(1)]]
    assert {tuple(sorted(row["neg"])) for row in rows} == {
        tuple(sorted(passage(i) for i in (5, 6, 7))),  # those with heat in them
        tuple(sorted(passage(i) for i in (3, 4, 5, 6, 7))),
    }
    assert all(list(row) == ["query", "pos", "neg"] for row in rows)
    assert len(load_rows(str(directory.parent / "train.jsonl"), "labels", str(directory.parent / "cache"))) == 2


def test_a_row_keeps_the_instruction_of_its_query_and_training_reads_it(collection):
    queries = [{**QUERIES[0], "instruction": "judge by the topic"}, *QUERIES[1:]]
    directory = collection(queries=queries, judgements=[("q3", "p4", 1), ("q1", "p2", 1)])
    without, instructed = mined(directory, "--first", 1)
    assert "instruction" not in without and instructed["instruction"] == "judge by the topic"
    rows = load_rows(str(directory.parent / "train.jsonl"), "labels", str(directory.parent / "cache"))
    assert rows["instruction"][:] == [None, "judge by the topic"]


@pytest.mark.parametrize(("first", "last", "expected"), [(1, 2, [1]), (2, 4, [1, 3]), (4, 5, [3, 4]), (7, 99, [6, 7])])
def test_negatives_are_of_the_ranks_asked_for(collection, first, last, expected):
    # Rank 1 is the query itself, rank 3 is relevant.
    (row,) = mined(collection(), "--first", first, "--last", last)
    assert sorted(row["neg"]) == sorted(passage(i) for i in expected)


def test_passages_judged_irrelevant_are_negatives_first(collection):
    judgements = [("q1", "p2", 1), ("q1", "p7", 0), ("q1", "p6", -1), ("q1", "p9", 0), ("q1", "p0", 0)]
    (row,) = mined(collection(judgements=judgements), "--first", 1, "--last", 4, "--negatives", 3)
    assert row["neg"][:2] == [passage(7), passage(6)]  # p9 is not in the corpus, p0 has the text of the query
    assert row["neg"][2] in {passage(1), passage(3)}
    (row,) = mined(collection(judgements=judgements), "--negatives", 1)
    assert row["neg"][0] in {passage(7), passage(6)}
    rows = mined(collection(judgements=[("q2", "p1", 1), ("q2", "p7", 0)]))  # BM25 finds nothing for q2
    assert [row["neg"] for row in rows] == [[passage(7)]]


def test_what_nothing_can_be_learned_from_is_left_out_and_counted(collection, caplog):
    corpus = [*CORPUS, {"_id": "empty", "text": " "}, {"_id": "twin", "title": "wing", "text": "lift  drag"}]
    queries = [*QUERIES, {"_id": "q4", "text": " "}, {"_id": "q5", "text": "cone wing"}]
    judgements = [
        *(("q1", name, 1) for name in ("p0", "p2", "empty")),
        ("q1", "empty", 1),
        ("q1", "p5", 0),
        ("q4", "p1", 1),
        ("q5", "empty", 1),
    ]
    (row,) = mined(collection(corpus, queries, judgements), "--first", 1)
    assert row["pos"] == [passage(2)] and row["neg"][0] == passage(5)
    assert not {"wing", "wing lift  drag", ""} & set(row["neg"])
    assert (
        "3 queries. Left out are passages that are the query: 1, empty passages: 2, empty queries: 1, queries without "
        "a relevant passage: 1" in caplog.text
    )


def test_no_more_negatives_than_asked_for_and_none_twice(collection):
    (row,) = mined(collection(), "--first", 1, "--negatives", 3)
    assert len(row["neg"]) == len(set(row["neg"])) == 3


def test_a_passage_with_the_text_of_a_relevant_one_or_of_the_query_is_no_negative(collection):
    twin = {"_id": "twin", "title": " wing", "text": "lift drag"}
    (row,) = mined(collection([*CORPUS, twin], judgements=[("q1", "p2", 1), ("q1", "twin", 1)]), "--first", 1)
    assert row["pos"] == [passage(2)] == ["wing lift drag"]
    assert sorted(row["neg"]) == sorted(passage(i) for i in (1, 3, 4, 5, 6, 7))
    (row,) = mined(collection([*CORPUS, {**twin, "title": None, "text": "wing lift drag"}]), "--first", 1)
    assert "wing lift drag" not in row["neg"] and "wing" not in row["neg"]


def test_what_is_drawn_depends_on_seed_and_query_alone(collection, monkeypatch):
    corpus = [{"_id": str(i), "text": f"wing {i:03}"} for i in range(60)]
    queries = [{"_id": str(i), "text": f"wing {i:03}"} for i in range(20)]
    judgements = [(str(i), str(i + 20), 1) for i in range(20)]
    rows = mined(collection(corpus, queries, judgements), "--seed", 1)
    assert mined(collection(corpus, queries, judgements), "--seed", 1) == rows
    assert mined(collection(corpus, queries, judgements), "--seed", 2) != rows
    monkeypatch.setattr(bm25, "QUERIES_AT_ONCE", 3)
    monkeypatch.setattr(resuming, "QUERIES_AT_ONCE", 7)
    assert mined(collection(corpus, queries, judgements[::-1]), "--seed", 1) == rows[::-1]
    assert len({tuple(text[5:] for text in row["neg"]) for row in rows}) == 20


def test_queries_without_negatives_are_dropped_and_counted(collection, caplog):
    judgements = [("q2", "p1", 1), ("q1", "p2", 1)]
    (row,) = mined(collection(judgements=judgements))
    assert row["query"] == "wing"
    assert "Left out are queries without a negative: 1" in caplog.text


def test_without_any_row_nothing_is_written(collection):
    directory = collection(judgements=[("q2", "p1", 1)])
    with pytest.raises(ValueError, match=r"none of 1 queries has a training row\..* without a negative: 1"):
        mined(directory)
    assert [path.name for path in directory.parent.iterdir()] == ["beir"]


@pytest.mark.parametrize("ranks", [("--negatives", 0), ("--first", 0), ("--first", 5, "--last", 4)])
def test_impossible_ranks_are_refused(collection, ranks):
    with pytest.raises(ValueError, match=r"negatives=\d+, first=\d+, last=\d+: negatives must be"):
        mined(collection(), *ranks)


@pytest.mark.parametrize("package", ["bm25s", "Stemmer"])
def test_the_extra_to_install_is_named(collection, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install flagembedding_matryoshka\[mining\]"):
        mined(collection())


def test_lists_are_interleaved():
    ranks = best_ranks([[5, 3, 1], [5, 1, 7, 3, 8]])
    assert list(ranks.items()) == [(5, 1), (3, 2), (1, 2), (7, 3), (8, 5)]
    assert list(best_ranks([[4, 2, 9]]).items()) == [(4, 1), (2, 2), (9, 3)]


@pytest.mark.parametrize(("first", "expected"), [(1, [6, 7, 1, 5]), (2, [1, 5]), (3, [])])
def test_the_best_of_two_ranks_counts(collection, first, expected):
    read = read_collection(collection(), "train")
    miners = [lambda texts, queries, k: [[6, 1, 2][:k]], lambda texts, queries, k: [[7, 5, 6][:k]]]
    ((row, left_out),) = mine(read, ["q1"], 9, first, 3, 0, miners)
    if expected:
        assert sorted(row["neg"]) == sorted(passage(i) for i in expected)
    else:
        assert row is None and left_out == {"queries without a negative": 1}


@pytest.fixture(scope="module")
def bi_encoder(tmp_path_factory):
    return save_bi_encoder(tmp_path_factory.mktemp("bi_encoder"))


@pytest.mark.usefixtures("one_thread")
def test_negatives_are_of_the_bi_encoders_ranks_or_of_either(collection, bi_encoder):
    directory = collection(judgements=[("q2", "p2", 1), ("q3", "p3", 1)])
    words = ["--bi_encoder", bi_encoder, "--device", "cpu", "--first", 2, "--last", 3]
    rows = mined(directory, "--miner", "bi_encoder", *words)
    assert not list(directory.parent.glob("*.vectors*"))
    texts, queries = [passage(i) for i in range(8)], [QUERIES[1]["text"], QUERIES[2]["text"]]
    lists = [[texts[i] for i in places] for places in BiEncoder(str(bi_encoder)).lists(texts, queries, 3)]
    assert [row["query"] for row in rows] == queries
    for row, hits in zip(rows, lists, strict=True):
        assert sorted(row["neg"]) == sorted(set(hits[1:]) - set(row["pos"]))

    (heat,) = mined(directory, "--last", 3)  # BM25 finds nothing for "a nozzle?"
    both = mined(directory, "--miner", "both", *words)
    assert both[0] == rows[0]
    assert set(both[1]["neg"]) <= set(heat["neg"]) | set(rows[1]["neg"])
    assert set(both[1]["neg"]) >= set(heat["neg"]) - {lists[1][0]}


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--miner", "both"], "--miner both needs --bi_encoder"),
        (["--miner", "bi_encoder", "--device", "cpu"], "--miner bi_encoder needs --bi_encoder"),
        (["--bi_encoder", "m"], "--bi_encoder is for --miner bi_encoder or both"),
        (["--use_fp16"], "--use_fp16 is for --miner bi_encoder or both"),
        (["--miner", "splade"], "invalid choice: 'splade'"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, capsys, words, fault):
    with pytest.raises(SystemExit):
        mined(tmp_path / "nowhere", *words)
    assert fault in capsys.readouterr().err


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert write_rows(path, [{"query": "é"}, {}]) == 2
    assert path.read_text(encoding="utf-8") == '{"query": "é"}\n{}\n'

    def broken():
        yield {}
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_rows(path, broken())
    assert path.read_text(encoding="utf-8").count("\n") == 2
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(IsADirectoryError, match="new is a directory"):
        write_rows(path.parent, broken())


def test_the_cranfield_collection(shared_data, tmp_path):
    output = tmp_path / "train.jsonl"
    main(["--data", str(shared_data / "cranfield"), "--split", "test", "--output", str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(load_rows(str(output), "labels", str(tmp_path / "cache"))) == len(rows) == 225
    assert all(len(row["neg"]) == 15 and not set(row["neg"]) & set(row["pos"]) for row in rows)
    # 1612 are judged relevant, and the text of passage 995 is empty.
    assert rows[0]["query"].startswith("what similarity laws") and sum(len(row["pos"]) for row in rows) == 1611
