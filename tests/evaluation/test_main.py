import json
import re

import pytest
import torch
from safetensors.torch import load_file

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation import measure
from flagembedding_matryoshka.evaluation.__main__ import main
from flagembedding_matryoshka.evaluation.arguments import RERANKER, build_parser
from flagembedding_matryoshka.evaluation.fusion import WEIGHTS
from flagembedding_matryoshka.inference.arguments import given_options
from flagembedding_matryoshka.inference.calibration import from_json
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan, load_plan
from flagembedding_matryoshka.setting import Setting
from tests.collection import WORDS, write_collection
from tests.encoders import save_bi_encoder

pytest.importorskip("matplotlib")
JUDGEMENTS = [("q1", "p2", 1), ("q2", "p0", 1), ("q3", "p7", 2)]
SETTINGS = ["--cutoff_layers", "3", "6", "--compress_layers", "2", "--compress_ratios", "1", "2"]


@pytest.fixture
def model(tiny_layerwise_path, tmp_path):
    """A copy of the model, into whose directory a plan may be written."""
    path = tmp_path / "model"
    path.mkdir()
    for file in tiny_layerwise_path.iterdir():
        (path / file.name).symlink_to(file)
    return path


@pytest.fixture
def no_picture(monkeypatch):
    """Write empty pictures, because drawing takes most of the time."""
    monkeypatch.setattr(
        "flagembedding_matryoshka.evaluation.report.files.plot", lambda report, title, path: path.touch()
    )
    monkeypatch.setattr("flagembedding_matryoshka.evaluation.report.html.svg_charts", lambda *arguments: [])


@pytest.fixture
def evaluate_and_draw(model, tmp_path):
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


@pytest.fixture
def evaluate(evaluate_and_draw, no_picture):
    return evaluate_and_draw


def test_what_is_written(evaluate_and_draw, capsys):
    output = evaluate_and_draw()
    names = {"layer3", "layer6", "layer3_ratio2_2", "layer6_ratio2_2", "cascade_3-0.5_layer6"}
    names |= {"cascade_3-0.5_layer6_ratio2_2"}
    assert {path.stem for path in (output / "runs").iterdir()} == names
    results = json.loads((output / "results.json").read_text())
    assert len(results["settings"]) == len(names)
    assert (output / "quality_cost.png").read_bytes().startswith(b"\x89PNG")
    text = (output / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert all(measure in text for measure in ("change", "95 %", "GFLOP/pair", "ms/pair"))
    full = {"cutoff_layers": [6], "compress_layers": [], "cascade": []}
    for item in results["settings"]:
        assert item["milliseconds_per_pair"] == pytest.approx(1000 / item["pairs_per_second"])
        if full.items() <= item.items():
            assert item["nDCG@10_change_95"] is None
        else:
            low, high = item["nDCG@10_change_95"]
            assert low <= item["nDCG@10_change"] <= high
    assert any(item["on_time_front"] for item in results["settings"])
    assert (output / "report.html").read_text().count('class="point') == 2 * len(names)


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


def test_what_is_not_given_is_left_to_the_re_ranker():
    words = ["--model", "m", "--data", "d", "--cutoff_layers", "3", "--fusion", "0.5"]
    assert given_options(build_parser().parse_args(words), RERANKER) == {}
    words += ["--max_length", "192", "--devices", "cpu", "--peft_path", "a", "b"]
    given = {"max_length": 192, "devices": ["cpu"], "peft_path": ["a", "b"]}
    assert given_options(build_parser().parse_args(words), RERANKER) == given


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

    for name in ("score_exits", "run_cascade", "speed_and_memory"):
        monkeypatch.setattr(measure, name, measured_again)
    assert json.loads((evaluate() / "results.json").read_text()) == first


def test_texts_are_tokenised_once_for_all_settings_and_measures(evaluate, tokenized_texts):
    results = json.loads((evaluate() / "results.json").read_text())
    assert len(results["settings"]) > 4 and results["pairs"] > 4
    assert len(tokenized_texts) == len(set(tokenized_texts)) <= results["pairs"] + results["queries"]


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
    Plan((2, 3, 4, 5, 6), (), "d/test", 9, "BM25's first 10", (Measurement(chosen, 0.5, 0.9),)).write(model / PLAN_NAME)
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


def lines_of(path, passages):
    rows = [(query, number, 9 - rank) for query in ("q1", "q2", "q3") for rank, number in enumerate(passages)]
    path.write_text("".join(f"{query} Q0 p{number} 1 {score} x\n" for query, number, score in rows))
    return str(path)


def test_several_first_stages_stand_side_by_side(evaluate, tmp_path):
    runs = [lines_of(tmp_path / f"{name}.trec", order) for name, order in (("dense", [0, 2, 7]), ("sparse", [7, 5]))]
    output = evaluate("--run", runs[0], "--run", runs[1], "--run", "bm25")
    results = json.loads((output / "results.json").read_text())
    stages = [results, *results["other_first_stages"]]
    sources = ["the first 100 of dense.trec", "the first 100 of sparse.trec", "BM25's first 100"]
    assert [stage["candidates"] for stage in stages] == sources
    assert [stage["baselines"][0]["name"] for stage in stages] == [f"{source}, as given" for source in sources]
    assert [stage["pairs"] for stage in stages[:2]] == [9, 6]
    for name in ("dense", "sparse", "bm25"):
        assert len(list((output / name / "runs").iterdir())) == len(results["settings"])
    first, *_ = (output / "table.md").read_text().split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()]
    assert rows[0] == ["nDCG@10", "dense", "sparse", "bm25"] and rows[2][0] == "as given"
    by_name = {row[0]: row[1:] for row in rows[2:]}
    for number, stage in enumerate(stages):
        (full,) = (item for item in stage["settings"] if item["nDCG@10_change_95"] is None)
        assert by_name["6 layers"][number] == f"{full['nDCG@10']:.4f}"
    assert {path.name for path in output.glob("*.png")} == {
        *("quality_cost.png", "quality_cost_sparse.png", "quality_cost_bm25.png")
    }


def test_first_stages_of_one_name_are_refused(evaluate, tmp_path, capsys):
    run = lines_of(tmp_path / "dense.trec", [0, 2])
    with pytest.raises(SystemExit):
        evaluate("--run", run, "--run", run)
    assert "--run names files by their name without its suffix, and dense is given twice" in capsys.readouterr().err


def test_the_plan_says_which_queries_chose_and_what_the_others_say(evaluate, model):
    output = evaluate("--write_plan")
    results = json.loads((output / "results.json").read_text())
    plan = load_plan(str(model), MatryoshkaReranker(str(model), devices="cpu").config)
    assert {"choosing": plan.queries, "held_out": plan.held_out_queries} == results["halves"]
    assert plan.queries + plan.held_out_queries == 3
    assert all(item.held_out_ndcg_share is not None and item.calibration is None for item in plan.settings)
    front = {item["cutoff_layers"][0]: item for item in results["held_out"]}
    assert front and all(item["flops_share"] <= 1 for item in front.values())


def test_a_half_without_queries_is_refused_before_anything_is_measured(evaluate, model, monkeypatch):
    monkeypatch.setattr("flagembedding_matryoshka.evaluation.candidates.chooses", lambda query: True)
    with pytest.raises(ValueError, match="3 queries choose and 0 are held out"):
        evaluate("--write_plan")
    assert not (model / PLAN_NAME).exists()


def test_a_pickled_bi_encoder_is_refused_before_anything_is_measured(evaluate, tmp_path):
    encoder = save_bi_encoder(tmp_path / "encoder")
    weights = encoder / "model.safetensors"
    torch.save(load_file(weights), encoder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match=rf"the weights of {encoder} are pickled"):
        evaluate("--bi_encoder", "tiny", str(encoder))
    assert not (tmp_path / "output").exists()


def test_calibrated_scores_come_from_the_plan_that_was_written(evaluate, model, tmp_path):
    output = evaluate("--write_plan", "--calibrate", "--run", lines_of(tmp_path / "all.trec", range(8)))
    results = json.loads((output / "results.json").read_text())
    plain = MatryoshkaReranker(str(model), devices="cpu", dtype="float32")
    calibrated = MatryoshkaReranker(str(model), devices="cpu", dtype="float32", normalize="calibrated")
    pairs = [("wing", "wing lift drag"), ("the heat", "wing")]
    assert len(results["calibrated"]) == 4
    for item in results["calibrated"]:
        assert {"sigmoid", "calibrated", "base_rate"} == set(item["errors"])
        options = {name: item[name] for name in ("cutoff_layers", "compress_layers", "compress_ratio")}
        scores = torch.tensor(plain.compute_score(pairs, **options))
        expected = from_json(item["calibration"])(scores)
        assert calibrated.compute_score(pairs, **options) == pytest.approx(expected.tolist(), abs=1e-6)
    calibrated.rank("wing", ["wing lift", "heat"], cascade={3: 0.5})
    with pytest.raises(ValueError, match="no calibration of 5 layers"):
        calibrated.compute_score(pairs, cutoff_layers=5)
    assert re.search(r"\| +base rate \|", (output / "table.md").read_text())


def test_candidates_without_a_relevant_one_are_refused_before_anything_is_measured(evaluate, tmp_path):
    run = lines_of(tmp_path / "poor.trec", [4, 6])
    with pytest.raises(ValueError, match="none are relevant: a calibration needs"):
        evaluate("--calibrate", "--run", run)
    assert not (tmp_path / "output").exists()


def test_fused_orders_are_measured_and_their_weight_is_in_the_plan(evaluate, model, tmp_path, capsys):
    run = lines_of(tmp_path / "mine.trec", [7, 0, 2, 5])
    encoder = save_bi_encoder(tmp_path / "encoder")
    options = ["--run", run, "--bi_encoder", "tiny", str(encoder), "--write_plan"]
    plain = json.loads((evaluate(*options) / "results.json").read_text())
    output = evaluate(*options, "--fusion", "0", "0.5", "8")
    results = json.loads((output / "results.json").read_text())
    found = results["fusion"]
    assert plain["fusion"] is None and plain["settings"] == results["settings"]
    assert [item["weight"] for item in found["weights"]] == [0, 0.5, 8]
    best = max(item["nDCG@10"] for item in found["weights"])
    assert found["weight"] == next(item["weight"] for item in found["weights"] if item["nDCG@10"] == best)
    assert {"choosing": found["queries"], "held_out": found["held_out_queries"]} == results["halves"]
    depths = [[item[name] for name in ("cutoff_layers", "cascade")] for item in results["settings"]]
    assert [[item[name] for name in ("cutoff_layers", "cascade")] for item in found["settings"]] == depths
    assert [item["name"] for item in found["orders"]][2:] == [
        *("tiny + first stage", "6 layers + first stage", "6 layers + first stage + tiny")
    ]
    said = capsys.readouterr().out
    assert (
        f"the first 100 of mine.trec: fusion weight {found['weight']:g}, chosen by {found['queries']} queries" in said
    )
    assert "plain and fused at weight" in (output / "table.md").read_text()
    assert 'data-row="s0f1"' in (output / "report.html").read_text()

    plan = json.loads((model / PLAN_NAME).read_text())
    assert plan["fusion"] == found["weight"]
    with MatryoshkaReranker(str(model), devices="cpu", dtype="float32") as reranker:
        scores = {"first_stage_scores": [3.0, 1.0, -5.0]}
        hits = [reranker.rank("wing", WORDS[:3], **scores, fusion=fusion) for fusion in ("auto", plan["fusion"])]
    assert hits[0] == hits[1]


def test_without_weights_several_are_tried_and_every_first_stage_has_its_own(evaluate, tmp_path):
    runs = [lines_of(tmp_path / f"{name}.trec", order) for name, order in (("dense", [0, 2, 7]), ("sparse", [7, 5]))]
    output = evaluate("--run", runs[0], "--run", runs[1], "--fusion")
    results = json.loads((output / "results.json").read_text())
    found = [results["fusion"], *(stage["fusion"] for stage in results["other_first_stages"])]
    for report in found:
        assert [item["weight"] for item in report["weights"]] == list(WEIGHTS)
    assert "| fusion weight " in (output / "table.md").read_text()


def test_the_texts_of_fused_cascades_are_not_tokenised_again(evaluate, tokenized_texts):
    evaluate("--fusion", "3")
    assert len(tokenized_texts) == len(set(tokenized_texts))


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "much"])
def test_an_invalid_weight_is_refused(evaluate, weight, capsys):
    with pytest.raises(SystemExit):
        evaluate(f"--fusion={weight}")
    assert f"'{weight}' must be a finite number of at least 0" in capsys.readouterr().err


def test_fusion_without_scores_is_refused_before_measuring(evaluate, tmp_path, monkeypatch):
    run = tmp_path / "same.trec"
    run.write_text("".join(f"q{query} Q0 p{number} 1 1 x\n" for query in (1, 2, 3) for number in (0, 4)))
    with pytest.raises(ValueError, match=r"the first 100 of same\.trec: --fusion needs the first stage's scores"):
        evaluate("--run", str(run), "--fusion")
    monkeypatch.setattr("flagembedding_matryoshka.evaluation.candidates.chooses", lambda query: True)
    with pytest.raises(ValueError, match="3 queries choose and 0 are held out"):
        evaluate("--fusion")
    assert not (tmp_path / "output").exists()
