import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flagembedding_matryoshka.finetune.rows import load_rows
from flagembedding_matryoshka.mining import scores as teacher_scores
from flagembedding_matryoshka.mining.scores import (
    drop_false_negatives,
    join_scores,
    main,
    raise_positives,
    score_rows,
)
from flagembedding_matryoshka.mining.teachers import bm25_teacher
from tests.encoders import WORDS, save_bi_encoder, save_cross_encoder
from tests.lines import write

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = [("flagembedding", "--model_class", "encoder-only-base"), ("cross_encoder",)]


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    return save_cross_encoder(tmp_path_factory.mktemp("cross_encoder"), labels=1)


@pytest.fixture(scope="module")
def rows():
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(60)]
    return [{"query": texts.pop(), "pos": [texts.pop()], "neg": [texts.pop() for _ in range(1 + i)]} for i in range(7)]


@pytest.fixture
def training_rows(rows, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_rows_with_labels_are_taught_and_keep_grades_and_instruction(tmp_path):
    row = {"query": "q", "passages": ["a", "bb", "ccc"], "labels": [0, 2, 1], "instruction": "find"}
    path = write(tmp_path / "graded.jsonl", row)
    (batch,) = score_rows(path, lambda pairs: [float(len(passage)) for _, passage in pairs], range(1), 1)
    assert batch == [{"pos_scores": [2.0, 3.0], "neg_scores": [1.0]}]
    (taught,) = join_scores(path, range(1), map(json.dumps, batch))
    assert taught == {
        "query": "q", "instruction": "find", "pos": ["bb", "ccc"], "neg": ["a"], "pos_labels": [2, 1], **batch[0],
    }  # fmt: skip
    assert load_rows(str(write(tmp_path / "taught.jsonl", taught)), "scores", str(tmp_path))["pos_labels"][:] == [
        [2, 1]
    ]


@torch.no_grad()
def logits(path, pairs):
    """Scores of single pairs by transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path)
    return [model.eval()(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]


def scored(path, model, backend, *more):
    output = path.parent / "scored.jsonl"
    words = ["--input", path, "--output", output, "--model", model, "--max_length", 64, "--device", "cpu", *more]
    main([*map(str, words), "--backend", *backend])
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend[0])
def test_scores_are_the_logits_of_transformers(cross_encoder, training_rows, rows, backend, monkeypatch):
    monkeypatch.setattr(teacher_scores, "ROWS_AT_ONCE", 3)
    found = scored(training_rows, cross_encoder, backend, "--batch_size", 4)
    assert [{name: row[name] for name in ("query", "pos", "neg")} for row in found] == rows
    expected = [logits(cross_encoder, [(row["query"], text) for text in (*row["pos"], *row["neg"])]) for row in rows]
    assert len({round(score, 3) for scores in expected for score in scores}) > 30
    assert max(map(max, expected)) > 1  # of which a sigmoid would leave nothing
    for row, scores in zip(found, expected, strict=True):
        assert row["pos_scores"] + row["neg_scores"] == pytest.approx(scores, abs=1e-4)
        assert len(row["pos_scores"]) == 1
    assert (
        len(load_rows(str(training_rows.parent / "scored.jsonl"), "scores", str(training_rows.parent / "cache"))) == 7
    )


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend[0])
def test_pairs_are_cut_to_the_length_asked_for(cross_encoder, tmp_path, backend):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"query": "wing", "pos": ["lift drag heat"], "neg": ["lift drag flow"]}))
    (whole,), (cut,) = (scored(path, cross_encoder, backend, "--max_length", length) for length in (64, 6))
    assert whole["pos_scores"] != pytest.approx(whole["neg_scores"], abs=1e-2)
    assert cut["pos_scores"] == pytest.approx(cut["neg_scores"], abs=1e-4)


def test_other_fields_stay_and_old_scores_go(tmp_path):
    row = {"id": 7, "prompt": None, "query": "é", "pos": ["p"], "pos_scores": [9], "neg": ["n", "m"], "type": "x"}
    path = tmp_path / "train.jsonl"
    path.write_text(f"\n{json.dumps(row)}\n\n{json.dumps({**row, 'neg': ['n']})}\n")
    (scores,) = score_rows(path, lambda pairs: np.arange(len(pairs)), range(2), 9)
    found = list(join_scores(path, range(2), map(json.dumps, scores)))
    assert found == [
        {**row, "pos_scores": [0.0], "neg_scores": [1.0, 2.0]},
        {**row, "neg": ["n"], "pos_scores": [3.0], "neg_scores": [4.0]},
    ]


def test_rows_are_read_a_chunk_at_a_time(training_rows, rows):
    asked = []

    def scorer(pairs):
        asked.append(pairs)
        return [float(len(text)) for _, text in pairs]

    found = score_rows(training_rows, scorer, range(7), 2)
    assert [scores["pos_scores"] for scores in next(found)] == [[len(row["pos"][0])] for row in rows[:2]]
    assert asked == [[(row["query"], text) for row in rows[:2] for text in (*row["pos"], *row["neg"])]]
    assert list(map(len, found)) == [2, 2, 1] and len(asked) == 4
    assert list(map(len, score_rows(training_rows, scorer, range(4, 7), 2))) == [2, 1]


def test_rows_without_negatives_keep_none(tmp_path):
    row = {"query": "wing", "pos": ["lift wing"], "neg": []}
    path = write(tmp_path / "train.jsonl", row, {**row, "pos": ["drag"]})
    words = ["--backend", "bm25", "--drop_margin", "0", "--raise_positive", "1"]
    main(["--input", str(path), "--output", str(tmp_path / "out.jsonl"), *words])
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["pos_scores"] > second["pos_scores"] == [0.0]
    assert first["neg"] == first["neg_scores"] == second["neg_scores"] == []


def test_what_nothing_can_be_learned_from_is_left_out_and_counted(tmp_path, caplog):
    row = {"query": "wing", "pos": ["lift wing", " wing "], "neg": ["drag", "", "lift wing"]}
    ids = {"pos_id": [1, 2], "neg_id": [3, 4, 5], "neg_scores": [0.25, 0.5, 0.75], "pos_scores": [1.0, 2.0]}
    empty, lost = {**row, "query": " "}, {"query": "wing", "pos": ["lift"], "neg": ["lift"]}
    path = write(tmp_path / "train.jsonl", empty, {**row, **ids}, lost, {**row, "neg": []})
    caplog.set_level("INFO")
    main(["--input", str(path), "--output", str(tmp_path / "out.jsonl"), "--backend", "bm25"])
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (first["pos"], first["pos_id"], first["neg"], first["neg_id"]) == (["lift wing"], [1], ["drag"], [3])
    assert len(first["pos_scores"]) == len(first["neg_scores"]) == 1 and first["pos_scores"] != [1.0]
    assert second["pos"] == ["lift wing"] and second["neg"] == second["neg_scores"] == []
    assert (
        "left out are empty queries: 1, passages that are the query: 2, empty passages: 1, negatives that are also "
        "positives: 2, rows that lose all of neg: 1" in caplog.text
    )


def test_shards_concatenate_to_the_whole(training_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher_scores, "ROWS_AT_ONCE", 2)

    def run(name, *words):
        output = tmp_path / name
        main(["--input", str(training_rows), "--output", str(output), "--backend", "bm25", *words])
        return output.read_bytes()

    shards = [run(f"{number}.jsonl", "--shard", f"{number}/3") for number in (1, 2, 3)]
    assert b"".join(shards) == run("whole.jsonl") and [shard.count(b"\n") for shard in shards] == [2, 2, 3]
    with pytest.raises(SystemExit):
        run("out.jsonl", "--shard", "1/8")
    assert "--shard 1/8 of --input" in capsys.readouterr().err


class Killed(BaseException):
    """Like SIGKILL: no handler catches it."""


@pytest.fixture
def killable(monkeypatch):
    """A BM25 scorer that counts its pairs, and raises `Killed` instead of scoring the batch of a given number."""

    def teacher(texts, scale):
        score = bm25_teacher(texts, scale)
        killable.batches = 0

        def scores(pairs):
            if killable.batches == killable.kill_at:
                raise Killed
            killable.batches += 1
            killable.pairs += len(pairs)
            return score(pairs)

        return scores

    killable = SimpleNamespace(kill_at=None, pairs=0)
    monkeypatch.setitem(teacher_scores.TEACHERS, "bm25", teacher)
    monkeypatch.setattr(teacher_scores, "ROWS_AT_ONCE", 2)
    return killable


@pytest.mark.parametrize("more", [(), ("--drop_margin", 0.5, "--raise_positive", 1)])
def test_a_stopped_run_continues(more, killable, training_rows, rows, tmp_path):
    def run(name, *words):
        options = ["--input", training_rows, "--output", tmp_path / name, "--backend", "bm25", *more, *words]
        main([*map(str, options)])
        return (tmp_path / name).read_bytes()

    expected = run("whole.jsonl")
    total, killable.pairs = killable.pairs, 0
    killable.kill_at = 2
    with pytest.raises(Killed):
        run("out.jsonl")
    partial = tmp_path / "out.jsonl.partial"
    assert partial.read_text().count("\n") == 4 and not (tmp_path / "out.jsonl").exists()
    partial.write_bytes(partial.read_bytes()[:-5])  # killed while it wrote the fourth row
    with pytest.raises(
        ValueError, match=r"out\.jsonl\.partial was written with other settings.* scale was 1\.0 and is 2"
    ):
        run("out.jsonl", "--scale", 2)
    killable.kill_at = 1
    with pytest.raises(Killed):
        run("out.jsonl")
    killable.kill_at = None
    assert run("out.jsonl") == expected
    assert killable.pairs == total + sum(len(row["pos"]) + len(row["neg"]) for row in rows[2:4])
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "whole.jsonl", "out.jsonl"}


def test_scores_of_other_rows_are_not_continued(killable, training_rows, rows, tmp_path):
    options = ["--input", training_rows, "--output", tmp_path / "out.jsonl", "--backend", "bm25"]
    killable.kill_at = 1
    with pytest.raises(Killed):
        main([*map(str, options)])
    training_rows.write_text("\n".join(json.dumps(row) for row in rows[1:]))
    with pytest.raises(ValueError, match=r"other settings.*input was"):
        main([*map(str, options)])


def test_an_input_that_changes_while_it_is_scored_is_refused(killable, training_rows, rows, tmp_path):
    options = [*map(str, ("--input", training_rows, "--output", tmp_path / "out.jsonl", "--backend", "bm25"))]
    text = training_rows.read_text()
    teacher = teacher_scores.TEACHERS["bm25"]

    def changing(**given):
        score = teacher(**given)

        def scores(pairs):
            training_rows.write_text("\n".join(json.dumps(row) for row in [*rows[:-1], {**rows[-1], "query": "wing"}]))
            return score(pairs)

        return scores

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"train\.jsonl has changed while"):
        patch.setitem(teacher_scores.TEACHERS, "bm25", changing)
        main(options)
    assert not (tmp_path / "out.jsonl").exists()
    training_rows.write_text(text)
    killable.kill_at = 0
    main(options)
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 7


def test_other_margins_keep_the_scores(killable, training_rows, tmp_path):
    options = [*map(str, ("--input", training_rows, "--output", tmp_path / "out.jsonl", "--backend", "bm25"))]
    with pytest.raises(ValueError, match="all 7 rows lose all their negatives with --drop_margin 1000"):
        main([*options, "--drop_margin", "1000"])
    assert killable.batches == 4
    killable.kill_at = 0
    main(options)
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 7


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        (np.zeros(34), r"scores of shape \(34,\) for 35 pairs"),
        (np.zeros((2, 35)), r"scores of shape \(2, 35\) for 35 pairs"),
        ([0.0] * 34 + [float("nan")], r"the teacher returned the score nan for \('[a-z ]+', '[a-z ]+'\)"),
        ([float("-inf")] + [0.0] * 34, r"the teacher returned the score -inf for \('[a-z ]+', '[a-z ]+'\)"),
    ],
)
def test_what_is_no_score_is_refused(training_rows, scores, fault):
    with pytest.raises(ValueError, match=fault):
        list(score_rows(training_rows, lambda pairs: scores, range(7), 7))


@pytest.mark.parametrize(
    ("backend", "fault"),
    [(BACKENDS[0], "has 3 labels, but a re-ranker has one"), (BACKENDS[1], r"shape \(\d+, 3\) for")],
)
def test_a_classifier_is_no_teacher(training_rows, tmp_path, backend, fault):
    model = save_cross_encoder(tmp_path / "classifier", labels=3)
    with pytest.raises(ValueError, match=fault):
        scored(training_rows, model, backend)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier", "train.jsonl"]


def test_a_bad_row_is_named_before_the_teacher_is_loaded(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"query": "q", "pos": ["p"], "neg": ["n"]}\n\n{"query": "q", "pos": [], "neg": []}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: pos must be a list of at least one string, got \[\]"):
        scored(path, tmp_path / "no_such_model", BACKENDS[1])
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_does_not_say_the_class_needs_it(cross_encoder, training_rows):
    with pytest.raises(ValueError, match="model_class"):
        scored(training_rows, cross_encoder, ("flagembedding",))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--output", "{input}"], r"--output .*train\.jsonl is the input"),
        (["--output", "{parent}/./train.jsonl"], r"train\.jsonl is the input"),
        (
            ["--model_class", "encoder-only-base", "--backend", "cross_encoder"],
            "--backend cross_encoder does not take --model_class; its options: model, ",
        ),
        (["--scale", "2"], "--backend flagembedding does not take --scale"),
        (["--backend", "bm25"], "--backend bm25 does not take --model; its options: scale"),
        (["--backend", "bi_encoder", "--scale", "inf"], "argument --scale: inf is not finite"),
        (["--drop_margin", "nan"], "argument --drop_margin: nan is not finite"),
        (["--raise_positive", "1e999"], "argument --raise_positive: 1e999 is not finite"),
        (["--backend", "onnx"], "invalid choice: 'onnx'"),
        (["--backend", "bi_encoder", "--cutoff_layers", "3"], "--backend bi_encoder does not take --cutoff_layers"),
        (["--backend", "cross_encoder", "--use_fp16", "--use_bf16"], "--use_fp16 and --use_bf16 exclude each other"),
        (["--backend", "openai", "--use_bf16"], "--backend openai does not take --use_bf16"),
        (["--backend", "openai", "--answer", "maybe"], "invalid choice: 'maybe'"),
        (["--shard", "0/2"], "argument --shard: 0/2 is not I/N"),
        (["--max_length", "0"], "argument --max_length: 0 must be at least 1"),
        (["--query_max_length", "0"], "argument --query_max_length: 0 must be at least 1"),
        (["--batch_size", "-1"], "argument --batch_size: -1 must be at least 1"),
        (["--output", "{parent}"], "is a directory: name a file"),
        (["--input", "{parent}/empty.jsonl"], r"empty\.jsonl has no row"),
    ],
)
def test_what_cannot_be_done_is_refused(training_rows, tmp_path, capsys, words, fault):
    (tmp_path / "empty.jsonl").write_text("\n")
    before = training_rows.read_text()
    given = [word.format(input=training_rows, parent=tmp_path) for word in words]
    with pytest.raises(SystemExit):
        main(["--input", str(training_rows), "--output", str(tmp_path / "out.jsonl"), "--model", "m", *given])
    assert re.search(fault, capsys.readouterr().err)
    assert training_rows.read_text() == before and not (tmp_path / "out.jsonl").exists()


def test_a_teacher_needs_a_model(training_rows, capsys):
    with pytest.raises(SystemExit):
        main(["--input", str(training_rows), "--output", "out.jsonl", "--backend", "bi_encoder"])
    assert "--backend bi_encoder needs --model" in capsys.readouterr().err


def test_a_backend_has_an_alias(cross_encoder, training_rows):
    first, now = (scored(training_rows, cross_encoder, (name,)) for name in ("sentence_transformers", "cross_encoder"))
    assert first == now


def test_teachers_add_up(training_rows, tmp_path, rows):
    def taught(name, source, *words):
        main(["--input", str(source), "--output", str(tmp_path / name), *map(str, words)])
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    model = save_bi_encoder(tmp_path / "bi_encoder")
    bi_encoder = taught("bi", training_rows, "--backend", "bi_encoder", "--model", model, "--device", "cpu")
    bm25 = taught("bm25", training_rows, "--backend", "bm25", "--scale", 0.5)
    both = taught("both", tmp_path / "bi", "--backend", "bm25", "--scale", 0.5, "--add")
    raised = taught("raised", tmp_path / "bi", "--backend", "bm25", "--scale", 0.5, "--add", "--raise_positive", 1)
    assert len(both) == 7
    for row, first, second, after in zip(both, bi_encoder, bm25, raised, strict=True):
        for name in ("pos_scores", "neg_scores"):
            assert row[name] == pytest.approx(np.add(first[name], second[name]))
            assert any(first[name])
        assert after["neg_scores"] == row["neg_scores"]
        assert after["pos_scores"] == [max(row["pos_scores"][0], max(row["neg_scores"]) + 1)]
    assert [{name: row[name] for name in ("query", "pos", "neg")} for row in both] == rows


def test_nothing_is_added_to_scores_that_are_not_there(training_rows):
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: pos_scores is missing"):
        scored(training_rows, "no_such_model", BACKENDS[1], "--add")


def test_positives_are_raised_above_negatives():
    rows = [{"pos_scores": [5.0, 1.0, 2.5], "neg_scores": [0.0, 2.0], "id": 1}, {"pos_scores": [1], "neg_scores": [-3]}]
    assert list(raise_positives(rows, 0.5)) == [{**rows[0], "pos_scores": [5.0, 2.5, 2.5]}, rows[1]]
    assert rows[0]["pos_scores"] == [5.0, 1.0, 2.5]


@pytest.mark.parametrize(
    ("margin", "kept", "counts"),
    [
        (1.0, ["a"], "3 of 4 negatives are dropped, and 1 of 2 rows left out"),
        (0.0, ["a", "b"], "2 of 4 negatives are dropped, and 1 of 2 rows left out"),
        (-2.0, ["a", "b", "c"], "1 of 4 negatives are dropped, and 1 of 2 rows left out"),
    ],
)
def test_negatives_that_the_teacher_takes_for_positives_are_dropped(caplog, margin, kept, counts):
    row = {"id": 1, "pos": ["p", "q"], "neg": ["a", "b", "c"], "pos_scores": [0.0, 3.0], "neg_scores": [2.0, 3.0, 4.5]}
    lost = {"pos": ["p"], "neg": ["d"], "pos_scores": [0.0], "neg_scores": [9.0]}
    with caplog.at_level("INFO"):
        found = list(drop_false_negatives([row, lost], margin))
    assert found == [{**row, "neg": kept, "neg_scores": row["neg_scores"][: len(kept)]}]
    assert counts in caplog.text


def test_negatives_are_dropped_before_positives_are_raised(tmp_path):
    path = tmp_path / "train.jsonl"
    scores = {"pos_scores": [1.0], "neg_scores": [0.0, 9.0]}
    path.write_text(json.dumps({"query": "wing", "pos": ["lift"], "neg": ["drag", "heat"], **scores}))
    output = tmp_path / "out.jsonl"
    words = ["--backend", "bm25", "--add", "--drop_margin", "-5", "--raise_positive", "2"]
    main(["--input", str(path), "--output", str(output), *words])
    (row,) = map(json.loads, output.read_text().splitlines())
    assert (row["neg"], row["neg_scores"], row["pos_scores"]) == (["drag"], [0.0], [2.0])


def test_rows_that_all_lose_their_negatives_are_no_training_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"query": "wing", "pos": ["lift"], "neg": ["wing drag"]}))
    words = ["--input", path, "--output", tmp_path / "out.jsonl", "--backend", "bm25", "--drop_margin", 0]
    with pytest.raises(ValueError, match="all 1 rows lose all their negatives with --drop_margin 0"):
        main([*map(str, words)])
    assert not (tmp_path / "out.jsonl").exists()
