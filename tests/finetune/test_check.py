import sys

import pytest

from flagembedding_matryoshka.finetune import check
from flagembedding_matryoshka.finetune.__main__ import main
from tests.lines import write

ROWS = [
    {"query": "Wing  lift", "pos": ["air"], "neg": ["heat"], "pos_scores": [2.0], "neg_scores": [1.0]},
    {"query": "wing lift", "pos": ["Air"], "neg": ["heat"], "pos_scores": [2.0], "neg_scores": [3.0]},
    {"query": "wing lift", "pos": ["flow"], "neg": ["drag", "drag"]},
    {"query": "drag", "pos": ["cone", "plate"], "neg": ["CONE", "drag"]},
    {"query": "heat", "passages": ["", "shock", "air"], "labels": [0, 2, 1]},
    {"query": "plate", "passages": ["a", "b"]},
]


@pytest.fixture
def report(tmp_path):
    path = write(tmp_path / "train.jsonl", *ROWS, "{")
    dev = write(tmp_path / "dev.jsonl", {"query": "HEAT", "pos": ["shock", "x"], "neg": ["y"]})
    return check.check_rows([str(path)], {}, *check.digest_texts([str(dev)], {}))


def test_each_finding_is_counted(report):
    assert (report.rows, report.faults) == (6, 1)
    assert "train.jsonl, line 7: not JSON" in report.first_fault
    assert (report.repeated_queries, report.repeated_rows) == (2, 1)
    assert (report.repeated_passages, report.contradictions, report.query_as_passage) == (1, 1, 1)
    assert (report.empty_texts, report.negatives) == (1, 7)
    assert (report.scored_negatives, report.false_negatives) == (2, 1)
    assert (report.leaked_queries, report.leaked_positives) == (1, 1)
    assert sorted(report.queries.texts) == sorted(row["query"] for row in ROWS)


def test_the_sample_is_uniform_and_bounded(monkeypatch):
    monkeypatch.setattr(check, "SAMPLED_TEXTS", 50)
    sample = check.Sample()
    for number in range(1000):
        sample.add(str(number))
    numbers = list(map(int, sample.texts))
    assert len(set(numbers)) == 50 and 400 < sum(numbers) / 50 < 600


def test_lengths_are_those_of_the_tokenizer(tiny_tokenizer):
    texts = ["wing", "wing wing", "wing wing wing"]
    lengths = sorted(len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    line = check.describe_lengths(texts, lengths[1], tiny_tokenizer)
    assert line == (
        f"median {lengths[1]}, 95 % up to {int(lengths[1] + 0.9 * (lengths[2] - lengths[1]))}, longest {lengths[2]} "
        f"tokens; 33.3 % are above {lengths[1]} and truncated"
    )
    assert check.describe_lengths(texts, 2, None).endswith("longest 14 characters")


def test_the_command_prints_the_findings(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "train.jsonl", *ROWS)
    monkeypatch.setattr(sys, "argv", ["finetune", "check", str(path), "--eval_data", str(path)])
    main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "rows: 6, and 0 with a fault"
    assert "negatives above every positive by the teacher: 1 of 2 negatives with a teacher score" in printed
    assert "a query of the evaluation data: 6 of 6 rows" in printed
    bad = write(tmp_path / "bad.jsonl", "{")
    with pytest.raises(ValueError, match=r"no row is without a fault\. .*bad\.jsonl, line 1"):
        check.main([str(bad)])
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: not JSON"):
        check.main([str(path), "--eval_data", str(bad)])
