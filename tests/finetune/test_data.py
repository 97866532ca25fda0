import json

import pytest

from flagembedding_matryoshka.finetune import MatryoshkaDataArguments
from flagembedding_matryoshka.finetune.data import (
    MatryoshkaCollator,
    MatryoshkaTrainDataset,
)
from flagembedding_matryoshka.finetune.rows import check_training_file, good_lines, training_files
from flagembedding_matryoshka.text.templates import Template

ROW = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [1.0], "neg_scores": [0.0, 0.5]}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def dataset(path, tokenizer, **options):
    args = MatryoshkaDataArguments(train_data=[str(path)], cache_path=str(path.parent / "cache"), **options)
    return MatryoshkaTrainDataset(args, tokenizer)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{", "not JSON"),
        ("[1]", r"a row is an object with query, pos and neg, got \[1\]"),
        ({**ROW, "query": 3}, "query must be a string, got 3"),
        ({"query": "q", "neg": ["n"]}, "pos must be a list of at least one string, got None"),
        ({**ROW, "pos": []}, r"pos must be a list of at least one string, got \[\]"),
        ({**ROW, "neg": []}, r"neg must be a list of at least one string, got \[\]"),
        ({**ROW, "neg": ["n", None]}, "neg must be a list of at least one string"),
        ({**ROW, "neg_scores": [1.0]}, r"neg_scores must be a list of 2 numbers, one for each of neg, got \[1.0\]"),
        ({**ROW, "prompt": 5}, "prompt must be a string where it is given, got 5"),
        ({**ROW, "pos_scores": ["x"]}, r"pos_scores must be numbers, got \['x'\]"),
        ({**ROW, "pos_scores": [float("nan")]}, r"pos_scores must be numbers, got \[nan\]"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, row, fault):
    path = write(tmp_path / "bad.jsonl", ROW, "", row)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: {fault}"):
        check_training_file(str(path), needs_scores=False)


def test_scores_may_be_missing_only_where_no_method_reads_them(tmp_path):
    path = write(tmp_path / "plain.jsonl", {"query": "q", "pos": ["p"], "neg": ["n"]})
    assert check_training_file(str(path), needs_scores=False) == 1
    with pytest.raises(ValueError, match=r"line 1: pos_scores is missing\. Methods that need no .*: normal"):
        check_training_file(str(path), needs_scores=True)


def test_files_with_other_columns_and_number_types_are_joined(tmp_path, tiny_tokenizer):
    write(tmp_path / "a.jsonl", {**ROW, "id": 1, "pos_scores": [1], "neg_scores": [0, 2]})
    write(tmp_path / "b.jsonl", {**ROW, "id": "x", "prompt": "Yes?"})
    rows = dataset(tmp_path, tiny_tokenizer, train_group_size=2, knowledge_distillation=True)
    assert [rows[item][1][0] for item in (0, 1)] == [1.0, 1.0]


def test_files_and_directories(tmp_path):
    for name in ("b.jsonl", "a.json", "readme.txt"):
        write(tmp_path / name, ROW)
    assert training_files([str(tmp_path)]) == [str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")]
    with pytest.raises(FileNotFoundError, match=r"no training data at .*missing"):
        training_files([str(tmp_path / "missing")])
    with pytest.raises(ValueError, match=r"readme\.txt is not called \.json or \.jsonl"):
        training_files([str(tmp_path / "readme.txt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no"):
        training_files([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="train_data is empty"):
        MatryoshkaDataArguments(train_data=[])


def test_a_group_is_the_positive_then_negatives_with_their_scores(tmp_path, tiny_tokenizer):
    rows = dataset(write(tmp_path / "a.jsonl", ROW), tiny_tokenizer, train_group_size=3, knowledge_distillation=True)
    sequences, scores = rows[0]
    texts = [tiny_tokenizer.decode(sequence["input_ids"]) for sequence in sequences]
    assert f"A: q\nB: p\n{Template().prompt}" in texts[0]
    assert scores[0] == 1.0
    assert {text[text.index("B: ") + 3]: score for text, score in zip(texts, scores, strict=True)} == {
        "p": 1.0,
        "n": 0.0,
        "m": 0.5,
    }


def test_fewer_negatives_than_wanted_are_drawn_again(tmp_path, tiny_tokenizer):
    rows = dataset(write(tmp_path / "a.jsonl", ROW), tiny_tokenizer, train_group_size=8)
    sequences, scores = rows[0]
    assert len(sequences) == 8 and scores is None


def test_lengths_are_cut_as_the_reference_cuts_them(tmp_path, tiny_tokenizer):
    long = {"query": "wing " * 100, "pos": ["air " * 300], "neg": ["a"]}
    path = write(tmp_path / "a.jsonl", long)
    rows = dataset(path, tiny_tokenizer, train_group_size=2, query_max_len=16, passage_max_len=96)
    first, short = rows[0][0]
    prompt = len(tiny_tokenizer(Template().prompt, add_special_tokens=False)["input_ids"])
    assert first["query_length"] == 1 + 16 + 1
    assert first["prompt_length"] == prompt + 1
    # bos, query, separator and passage hold query_max_len + passage_max_len - prompt - separator tokens
    assert len(first["input_ids"]) - first["prompt_length"] == 16 + 96 - prompt - 1
    assert len(short["input_ids"]) < len(first["input_ids"])


def test_a_row_brings_its_own_prompt(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.jsonl", {**ROW, "prompt": "Yes?"}, {**ROW, "prompt": None})
    rows = dataset(path, tiny_tokenizer, train_group_size=2)
    assert tiny_tokenizer.decode(rows[0][0][0]["input_ids"]).endswith("\nYes?")
    assert tiny_tokenizer.decode(rows[1][0][0]["input_ids"]).endswith(Template().prompt)


def test_a_batch_keeps_part_lengths(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.jsonl", ROW, {**ROW, "query": "how does a wing lift"})
    rows = dataset(path, tiny_tokenizer, train_group_size=2, knowledge_distillation=True)
    batch = MatryoshkaCollator(tokenizer=tiny_tokenizer)([rows[0], rows[1]])
    sequences = [sequence for item in (0, 1) for sequence in rows[item][0]]
    pair = batch["pair"]
    assert pair["input_ids"].shape[0] == 4 and len(batch["teacher_scores"]) == 4
    assert pair["query_lengths"].tolist() == [sequence["query_length"] for sequence in sequences]
    assert pair["prompt_lengths"].tolist() == [sequence["prompt_length"] for sequence in sequences]
    assert (pair["attention_mask"].sum(1) > pair["query_lengths"] + pair["prompt_lengths"]).all()


def test_what_is_drawn_depends_on_seed_epoch_and_item_alone(tmp_path, tiny_tokenizer):
    row = {"query": "q", "pos": [f"pos {i}" for i in range(5)], "neg": [f"neg {i}" for i in range(20)]}
    path = write(tmp_path / "rows.jsonl", *[{**row, "query": f"q {i}"} for i in range(4)])
    first, other = (dataset(path, tiny_tokenizer, train_group_size=4) for _ in range(2))
    assert [first[item] for item in (0, 1, 2, 3)] == [other[item] for item in (3, 2, 1, 0)][::-1]
    epoch_0 = first[0]
    first.start_epoch(1)
    assert first[0] != epoch_0
    first.start_epoch(0)
    assert first[0] == epoch_0
    assert MatryoshkaTrainDataset(first.args, tiny_tokenizer, seed=7)[0] != epoch_0


def test_good_lines_are_copied_only_where_there_are_bad_ones(tmp_path, caplog):
    path = write(tmp_path / "good.jsonl", ROW, ROW)
    assert good_lines(str(path), True, str(tmp_path)) == str(path)
    bad = write(tmp_path / "bad.jsonl", ROW, "{", {**ROW, "pos": []}, ROW)
    copy = good_lines(str(bad), True, str(tmp_path))
    assert copy == good_lines(str(bad), True, str(tmp_path))
    assert check_training_file(copy, needs_scores=True) == 2
    assert "2 bad lines are left out, 2 are kept. line 2: not JSON" in caplog.text
    assert len(list((tmp_path / "good_lines").iterdir())) == 1


def test_a_share_of_the_positives_comes_in_another_order(tmp_path, tiny_tokenizer):
    text = " ".join(["first"] * 20 + ["second"] * 20 + ["third"] * 20)
    path = write(tmp_path / "long.jsonl", *[{"query": f"q {i}", "pos": [text], "neg": ["n"]} for i in range(40)])
    plain, shuffled = (dataset(path, tiny_tokenizer, train_group_size=2, shuffle_ratio=ratio) for ratio in (0.0, 0.5))
    changed = sum(plain[item][0][0] != shuffled[item][0][0] for item in range(40))
    assert 5 < changed < 35
    assert all(plain[item][0][1] == shuffled[item][0][1] for item in range(40))


def test_random_negatives_are_passages_of_other_rows_of_the_same_file(tmp_path, tiny_tokenizer):
    for name in "ab":
        rows = [{**ROW, "query": f"q {name} {i}", "pos": [f"pos {name} {i}"]} for i in range(6)]
        write(tmp_path / f"{name}.jsonl", *rows)
    rows = dataset(tmp_path, tiny_tokenizer, train_group_size=5, random_negatives=0.5, knowledge_distillation=True)
    for item, (name, number) in enumerate((name, number) for name in "ab" for number in range(6)):
        sequences, scores = rows[item]
        texts = [tiny_tokenizer.decode(sequence["input_ids"]) for sequence in sequences]
        drawn = [text[text.index("B: ") + 3 : text.index(f"\n{Template().prompt}")] for text in texts]
        assert drawn[0] == f"pos {name} {number}"
        assert sorted(drawn[1:3]) == ["m", "n"]
        assert all(text.startswith(f"pos {name} ") and text != drawn[0] for text in drawn[3:])
        assert scores[3:] == [-10.0, -10.0]
    again = dataset(tmp_path, tiny_tokenizer, train_group_size=5, random_negatives=0.5, knowledge_distillation=True)
    assert again[3] == rows[3]
    again.start_epoch(1)
    assert again[3] != rows[3]


def test_random_negatives_need_other_rows(tmp_path, tiny_tokenizer):
    rows = dataset(write(tmp_path / "one.jsonl", ROW), tiny_tokenizer, train_group_size=3, random_negatives=1.0)
    with pytest.raises(ValueError, match=r"random_negatives=1\.0, but 100 rows .* this row's own, 'q'"):
        rows[0]
    with pytest.raises(ValueError, match=r"random_negatives is 1\.5, but is a share, from 0 to 1"):
        dataset(tmp_path / "one.jsonl", tiny_tokenizer, random_negatives=1.5)
