import json

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation import measuring
from flagembedding_matryoshka.evaluation.__main__ import main
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measured, Plan
from flagembedding_matryoshka.setting import Setting
from tests.collection import write_collection
from tests.encoders import save_bi_encoder

pytest.importorskip("matplotlib")
JUDGEMENTS = [("q1", "p2", 1), ("q2", "p0", 1), ("q3", "p7", 2)]
SETTINGS = ["--cutoff_layers", "3", "6", "--compress_layers", "2", "--compress_ratios", "1", "2"]


@pytest.fixture
def model(tiny_layerwise_path, tmp_path):
    """A copy that a plan may be written beside."""
    path = tmp_path / "model"
    path.mkdir()
    for file in tiny_layerwise_path.iterdir():
        (path / file.name).symlink_to(file)
    return path


@pytest.fixture
def evaluate(model, tmp_path):
    data = write_collection(tmp_path / "data", judgements=JUDGEMENTS, split="test")
    output = tmp_path / "output"

    def run(*arguments):
        main(
            [
                *("--model", str(model), "--data", str(data), "--output", str(output), "--dtype", "float32"),
                *("--devices", "cpu", "--timed_pairs", "4", "--cascade", "3:0.5", *SETTINGS, *arguments),
            ]
        )
        return output

    return run


def test_what_is_written(evaluate, capsys):
    output = evaluate()
    names = {"layer3", "layer6", "layer3_ratio2_2", "layer6_ratio2_2", "cascade_3-0.5_layer6"}
    names |= {"cascade_3-0.5_layer6_ratio2_2"}
    assert {path.stem for path in (output / "runs").iterdir()} == names
    results = json.loads((output / "results.json").read_text())
    assert len(results["settings"]) == len(names)
    assert (output / "quality_cost.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "table.md").read_text() in capsys.readouterr().out


def test_runs_hold_the_re_rankers_scores(evaluate, model, tmp_path):
    rows = [line.split() for line in (evaluate() / "runs" / "layer3_ratio2_2.trec").read_text().splitlines()]
    texts = {row["_id"]: row for row in map(json.loads, (tmp_path / "data/corpus.jsonl").read_text().splitlines())}
    queries = {
        row["_id"]: row["text"] for row in map(json.loads, (tmp_path / "data/queries.jsonl").read_text().splitlines())
    }
    reranker = MatryoshkaReranker(str(model), dtype="float32", devices="cpu")
    pairs = [(queries[row[0]], f"{texts[row[2]]['title']} {texts[row[2]]['text']}".strip()) for row in rows]
    expected = reranker.compute_score(pairs, cutoff_layers=3, compress_layers=[2], compress_ratio=2)
    assert [float(row[4]) for row in rows] == pytest.approx(expected, abs=1e-5)


def test_a_sample_of_the_queries(evaluate):
    results = json.loads((evaluate("--queries", "2") / "results.json").read_text())
    assert results["queries"] == 2


def test_words_around_the_texts_can_be_others(evaluate):
    runs = [sorted((evaluate(*words) / "runs").iterdir())[0].read_text() for words in ((), ("--template", "minicpm"))]
    assert runs[0] != runs[1]


def test_what_is_measured_is_not_measured_again(evaluate, monkeypatch):
    first = json.loads((evaluate() / "results.json").read_text())

    def measured_again(*arguments, **options):
        raise AssertionError("measured again")

    for name in ("score_exits", "cascade_run", "speed_and_memory"):
        monkeypatch.setattr(measuring, name, measured_again)
    assert json.loads((evaluate() / "results.json").read_text()) == first


def test_a_stopped_evaluation_goes_on_where_it_was(evaluate):
    output = evaluate()
    kept = (output / "settings" / "layer6.json").read_bytes()
    (output / "settings" / "layer3_ratio2_2.json").unlink()
    evaluate()
    assert (output / "settings" / "layer3_ratio2_2.json").exists()
    assert (output / "settings" / "layer6.json").read_bytes() == kept


def test_a_changed_run_is_measured_again(evaluate):
    output = evaluate()
    run = output / "runs" / "layer3.trec"
    before = run.read_text()
    run.write_text(before + "q1 Q0 p9 9 0 x\n")
    evaluate()
    assert run.read_text() == before


def test_the_plan_chooses_for_the_user(evaluate, model):
    with pytest.raises(FileNotFoundError, match="write_plan"):
        MatryoshkaReranker(str(model), devices="cpu", budget=0.6)
    evaluate("--write_plan")
    full = MatryoshkaReranker(str(model), devices="cpu", quality=1.0, dtype="float32")
    cheap = MatryoshkaReranker(str(model), devices="cpu", budget=0.6, dtype="float32")
    assert cheap.planned is not None and full.planned is not None
    pair = [("wing", "wing lift drag")]
    assert cheap.estimate_flops(pair) <= 0.75 * full.estimate_flops(pair, cutoff_layers=6)


def test_what_the_plan_chooses_is_measured_and_marked(evaluate, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="write_plan"):
        evaluate("--budgets", "0.5")
    chosen = Setting(4, (3,), 4)
    Plan((2, 3, 4, 5, 6), (), "d/test", 9, "BM25's first 10", (Measured(chosen, 0.5, 0.9),)).write(model / PLAN_NAME)
    encoder = save_bi_encoder(tmp_path / "encoder")
    output = evaluate("--budgets", "0.5", "1", "--random_order", "--bi_encoder", "tiny encoder", str(encoder))
    results = json.loads((output / "results.json").read_text())
    assert [item["budget"] for item in results["chosen"]] == [0.5, 1.0]
    (measured,) = (item for item in results["settings"] if item["compress_layers"] == [3])
    assert (measured["cutoff_layers"], measured["compress_ratio"]) == ([4], 4)
    names = ["BM25's first 100, as given", "random order", "tiny encoder"]
    assert [baseline["name"] for baseline in results["baselines"]] == names
    assert [baseline["flops_share"] is not None for baseline in results["baselines"]] == [False, False, True]
    (row,) = (line for line in (output / "table.md").read_text().splitlines() if "after 3" in line)
    assert row.split("|")[-2].strip() == "0.5, 1"


def test_settings_that_the_model_does_not_have_are_refused_at_once(evaluate):
    with pytest.raises(ValueError, match=r"cutoff_layers \[7\] have no head"):
        evaluate("--cutoff_layers", "7")
    with pytest.raises(SystemExit):
        evaluate("--cascade", "3:0.5", "3:0.2")
