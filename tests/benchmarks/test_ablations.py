import json
import math
from types import SimpleNamespace

import pytest

from benchmarks.ablations import compensation, distillation, training
from benchmarks.ablations.__main__ import main
from benchmarks.ablations.agreement import kendall_tau, overlap
from benchmarks.ablations.report import cells
from benchmarks.ablations.statistics import Arm, compare
from tests.collection import write_collection

pytest.importorskip("bm25s", reason="needs the extra mining")
pytestmark = pytest.mark.usefixtures("one_thread")
JUDGEMENTS = [("q1", "p2", 1), ("q2", "p0", 1), ("q3", "p7", 2)]


@pytest.fixture
def ablate(tmp_path):
    """Runs a claim on two collections, and returns its JSON and Markdown."""
    data = [write_collection(tmp_path / name, judgements=JUDGEMENTS, split="test") for name in ("one", "two")]

    def run(claim, *arguments):
        options = ["--devices", "cpu", "--top_k", "6", "--output", tmp_path / "docs", "--work", tmp_path / "work"]
        main([str(word) for word in (claim, "--data", *data, *options, *arguments)])
        files = [tmp_path / "docs" / f"{claim}.{kind}" for kind in ("json", "md")]
        return json.loads(files[0].read_text()), files[1].read_text()

    return run


def test_statistics_by_hand():
    reference = Arm({}, [[0.1, 0.2, 0.3], [0.3, 0.4, 0.5]])
    better = Arm({}, [[0.5, 0.6, 0.7], [0.7, 0.8, 0.9]], reference)
    mixed = Arm({}, [[0.3, 0.2, 0.4]], reference)
    first, second, third = compare([reference, better, mixed])
    assert (first.change, first.p_value) == (None, None)
    assert first.arm.of_queries == pytest.approx([0.2, 0.3, 0.4])
    assert first.deviation == pytest.approx(math.sqrt(2 * 0.1**2)) and third.deviation is None
    assert second.change == pytest.approx(0.4)
    # Of the 8 ways to give three differences a sign 2 lie as far from 0; the smaller of two counts twice, after Holm.
    assert second.p_value == pytest.approx(2 * 2 / 8)
    # 0.1, −0.1, 0 reach no further from 0 than by chance.
    assert third.change == pytest.approx(0, abs=1e-12) and third.p_value == 1
    assert cells([first, second])[1:] == [["0.3000", "0.1414", "", ""], ["0.7000", "0.1414", "+0.4000", "0.500"]]


def test_agreement_by_hand():
    reference = {"q": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}, "alone": {"a": 1.0}}
    run = {"q": {"a": 3.0, "b": 4.0, "c": 2.0, "d": 1.0}, "alone": {"a": 5.0}}
    assert kendall_tau(run, reference) == pytest.approx([(5 - 1) / 6])
    assert kendall_tau(reference, reference) == pytest.approx([1])
    assert overlap(run, reference, 1) == [0, 1]
    assert overlap(run, reference, 2) == [1, 1]
    assert overlap({"q": {"a": 1.0, "b": 2.0, "c": 4.0, "d": 3.0}}, {"q": reference["q"]}, 3) == pytest.approx([2 / 3])


def test_precision(ablate, tiny_layerwise_path):
    arguments = ["--model", tiny_layerwise_path, "--precisions", "bfloat16", "int8", "--cutoff_layers", "3", "6"]
    report, text = ablate("precision", *arguments, "--timed_pairs", "4")
    assert [table["collections"] for table in report["tables"]] == [
        ["one/test", "two/test"],
        ["one/test"],
        ["two/test"],
    ]
    rows = report["tables"][0]["rows"]
    assert [(row["exit"], row["weights"]) for row in rows] == [
        (layer, name) for layer in ("3", "6") for name in ("float32", "bfloat16", "int8")
    ]
    assert rows[0]["Kendall's tau"] == 1 and rows[1]["Kendall's tau"] > 0.5 and rows[2]["Kendall's tau"] > 0.5
    assert all(row["pairs/s"] > 0 for row in rows)
    assert rows[0]["p_value"] is None and 0 <= rows[1]["p_value"] <= 1
    assert (
        "dtype" not in report["about"]
        and report["about"]["torch"] in text
        and "pairs are truncated to: 512 tokens\n" in text
    )
    assert text.count("| exit |") == 3 and "6 queries" in text and "± seeds" not in text


def test_cascades(ablate, tiny_layerwise_path):
    arguments = [
        "--model",
        tiny_layerwise_path,
        "--cascade",
        "3:1",
        "--cascade",
        "2:0.5",
        "4:0.2",
        "--dtype",
        "float32",
    ]
    report, text = ablate("cascade", *arguments, "--queries", "2")
    full, everyone, dropping = report["tables"][0]["rows"]
    assert report["tables"][0]["queries"] == 4
    assert everyone["nDCG@10"] == full["nDCG@10"] and everyone["first ten in common"] == 1
    assert everyone["operations"] == pytest.approx(1, abs=1e-3) and 0.3 < dropping["operations"] < 0.7
    assert "| 2:0.5 → 4:0.2 → 6 layers |" in text


def test_distillation_compares_methods_exit_by_exit(ablate, tiny_layerwise_path, training_file, monkeypatch):
    asked = []

    def trained(options, model, output_dir, seed, arguments):
        asked.append((output_dir.name, seed, *arguments))
        return tiny_layerwise_path

    monkeypatch.setattr(distillation, "train", trained)
    arguments = ["--base", "base", "--train_data", training_file, "--steps", 2, "--seeds", 1, 2, "--dtype", "float32"]
    report, text = ablate("distillation", *arguments)
    assert asked[1] == ("distill_final_layer_teacher_seed1", 1, "--train_method", "distill_final_layer_teacher")
    assert len(asked) == 6
    rows = report["tables"][0]["rows"]
    assert [row["exit"] for row in rows[::4]] == ["2", "3", "4", "5", "6"]
    assert [row["compared with"] for row in rows[:4]] == ["", "normal", "normal", "distill_final_layer_teacher"]
    assert all(row["deviation"] == 0 and row["change"] in (None, 0) and row["p_value"] in (None, 1) for row in rows)
    assert "± seeds" in text and "- seeds: 1, 2\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "--seed", "3"], "['--seed'] after -- are set by this command"),
        (["--", "--train_method=normal"], "['--train_method=normal'] after -- are set"),
        (["--seeds", "1", "1"], "--seeds [1, 1] has a seed twice"),
    ],
)
def test_what_the_command_sets_is_not_set_twice(ablate, training_file, arguments, message, capsys):
    with pytest.raises(SystemExit):
        ablate("distillation", "--base", "b", "--train_data", training_file, "--steps", 2, "--seeds", 1, *arguments)
    assert message in capsys.readouterr().err


def test_a_finished_training_is_not_repeated_nor_taken_for_another(
    tiny_raw_model_path, training_file, tmp_path, monkeypatch
):
    commands = []
    monkeypatch.setattr(training.subprocess, "run", lambda command, check: commands.append(command))
    options = {"train_data": [str(training_file)], "steps": 2, "training_arguments": ["--bf16"], "work": tmp_path}
    for _ in range(2):
        training.train(SimpleNamespace(**options), str(tiny_raw_model_path), tmp_path / "out", 1)
    assert len(commands) == 1 and commands[0][-1] == "--resume_from_checkpoint"
    with pytest.raises(ValueError, match="holds a training with other steps: it was"):
        training.train(SimpleNamespace(**options | {"steps": 3}), str(tiny_raw_model_path), tmp_path / "out", 1)


def test_an_interrupted_training_is_gone_on_with(tiny_raw_model_path, training_file, tmp_path, monkeypatch):
    def killed(command, check):
        raise training.subprocess.CalledProcessError(-9, command)

    options = SimpleNamespace(train_data=[str(training_file)], steps=2, training_arguments=[], work=tmp_path)
    monkeypatch.setattr(training.subprocess, "run", killed)
    for _ in range(2):
        with pytest.raises(training.subprocess.CalledProcessError):
            training.train(options, str(tiny_raw_model_path), tmp_path / "out", 1)


TRAINING = ["--use_cpu", "True", "--exits", "2", "4", "--lora_rank", "4", "--train_group_size", "4"]
TRAINING += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]


@pytest.mark.slow
def test_trained_with_two_steps(ablate, tiny_raw_model_path, training_file, tmp_path):
    what = ["--train_data", training_file, "--steps", 2, "--seeds", 1, "--dtype", "float32"]
    report, text = ablate("distillation", "--base", tiny_raw_model_path, *what, "--", *TRAINING)
    rows = report["tables"][0]["rows"]
    assert [row["exit"] for row in rows] == ["2"] * 4 + ["4"] * 4
    assert ablate("distillation", "--base", tiny_raw_model_path, *what, "--", *TRAINING)[1] == text

    model = tmp_path / "work/distillation/models/normal_seed1"
    what += ["--ratio", 2, "--compress_layers", 1, 2]
    report, text = ablate("compensation", "--model", model, *what, "--", *TRAINING[:2], *TRAINING[5:])
    rows = report["tables"][0]["rows"]
    assert [(row["exit"], row["width"]) for row in rows[:3]] == [
        ("2", "ratio 2, no adapter"),
        ("2", "ratio 2, token adapter"),
        ("2", "full"),
    ]
    assert "trained on top of it for 2 steps" in text


def test_compensation_needs_a_model_that_was_trained(ablate, tiny_raw_model_path, training_file):
    arguments = ["--train_data", training_file, "--steps", 2, "--seeds", 1, "--compress_layers", 2]
    with pytest.raises(ValueError, match="is a raw checkpoint without heads"):
        ablate("compensation", "--model", tiny_raw_model_path, *arguments)


def test_compensation_measures_what_the_ratio_changes(ablate, tiny_layerwise_path, training_file, monkeypatch):
    class Trained(Exception):
        pass

    def train(options, model, output_dir, seed, arguments):
        raise Trained(arguments)

    monkeypatch.setattr(compensation, "train", train)
    arguments = ["--train_data", training_file, "--steps", 2, "--seeds", 1, "--compress_layers", 3, "--ratio", 4]
    with pytest.raises(Trained) as raised:
        ablate("compensation", "--model", tiny_layerwise_path, *arguments)
    assert raised.value.args[0] == ["--finetune_type", "token", "--compress_ratios", "4", "--compress_layers", "3"]
