import json
import shutil

import pytest

pytest.importorskip("mteb", reason="needs mteb, which wants Python 3.11")
import mteb
from mteb.mocks.mock_tasks import (
    MockInstructionReranking,
    MockMultilingualInstructionReranking,
    MockMultilingualRerankingTask,
    MockRerankingTask,
    MockRetrievalTask,
)

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan
from flagembedding_matryoshka.integrations.mteb import MatryoshkaSearch
from flagembedding_matryoshka.setting import Setting
from tests.qwen import write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")
CASCADE = {"compress_layers": [2], "compress_ratio": 2, "cascade": {3: 0.5}}
SETTINGS = [{"cutoff_layers": 3}, {}, CASCADE]


def run(model, task, predictions, **options):
    """What mteb measured, and its predictions by subset and split."""
    result = mteb.evaluate(
        model, task, cache=None, prediction_folder=predictions, show_progress_bar=False, co2_tracker=False, **options
    )
    (path,) = predictions.glob("*_predictions.json")
    return result.task_results[0], json.loads(path.read_text())


def ranked(scores):
    return sorted(scores, key=lambda name: -scores[name])


def texts_of(rows):
    """Texts by id, as mteb's documentation says that they are put together."""
    return {
        row["id"]: " ".join(filter(None, [row.get("title"), row["text"], row.get("instruction")])).strip()
        for row in rows
    }


@pytest.mark.parametrize(
    ("task_class", "options"),
    [
        (MockRerankingTask, {"cutoff_layers": 3}),
        (MockMultilingualRerankingTask, CASCADE),
        (MockInstructionReranking, CASCADE),
        (MockMultilingualInstructionReranking, {}),
    ],
)
def test_the_order_is_the_re_rankers_own(reranker, task_class, options, tmp_path):
    task = task_class()
    task.load_data()
    _, predictions = run(MatryoshkaSearch(reranker, **options), task, tmp_path)
    for subset, splits in task.dataset.items():
        for split in task.eval_splits:
            data = splits[split]
            queries, passages = texts_of(data["queries"]), texts_of(data["corpus"])
            assert set(predictions[subset][split]) == set(queries)
            for query, scores in predictions[subset][split].items():
                names = data["top_ranked"][query]
                hits = reranker.rank(queries[query], [passages[name] for name in names], **options)
                assert ranked(scores) == [names[hit["corpus_id"]] for hit in hits]
                if "cascade" in options:
                    assert sorted(scores.values(), reverse=True) == [-1.0, -2.0]
                else:
                    assert list(scores.values()) == pytest.approx([hit["score"] for hit in hits], abs=1e-5)


def test_an_instruction_is_read(reranker, tmp_path):
    scores = []
    for folder, task in (("plain", MockRerankingTask()), ("instructed", MockInstructionReranking())):
        _, predictions = run(MatryoshkaSearch(reranker), task, tmp_path / folder)
        scores.append(predictions["default"]["test"]["q1"])
    assert scores[0].keys() == scores[1].keys() and scores[0] != scores[1]


def test_the_second_stage_of_a_retrieval(reranker, tmp_path):
    first = mteb.get_model("mteb/baseline-random-encoder")
    _, before = run(first, MockRetrievalTask(), tmp_path / "first")
    task = MockRetrievalTask().convert_to_reranking(tmp_path / "first", top_k=1)
    result, after = run(MatryoshkaSearch(reranker, cutoff_layers=4), task, tmp_path / "second")
    for split, queries in before["default"].items():
        for query, scores in queries.items():
            assert list(after["default"][split][query]) == ranked(scores)[:1]
    assert result.scores["test"][0]["main_score"] is not None
    with pytest.raises(ValueError, match=r"MockRetrievalTask has no candidates.*convert_to_reranking"):
        run(MatryoshkaSearch(reranker), MockRetrievalTask(), tmp_path / "third")


def test_each_setting_has_a_cache_of_its_own(reranker, tmp_path, monkeypatch):
    cache = mteb.ResultCache(tmp_path)
    ranked_with = []
    plain = MatryoshkaReranker.rank_batch

    def rank_batch(self, *arguments, **options):
        ranked_with.append(options)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(MatryoshkaReranker, "rank_batch", rank_batch)
    models = [MatryoshkaSearch(reranker, **options) for options in SETTINGS]
    ranked_with.clear()
    for _ in range(2):
        for model in models:
            mteb.evaluate(model, MockRerankingTask(), cache=cache, show_progress_bar=False, co2_tracker=False)
    assert len(ranked_with) == len(models)
    assert len(list(tmp_path.rglob("MockRerankingTask.json"))) == len(models)


def test_what_is_the_same_shares_one(reranker):
    same = [
        MatryoshkaSearch(reranker),
        MatryoshkaSearch(reranker, cutoff_layers=6),
        MatryoshkaSearch(reranker, batch_size=3),
    ]
    assert len({model.mteb_model_meta for model in same}) == 1


def test_other_weights_are_another_revision(reranker, tiny_layerwise_path):
    def revision(**options):
        path = str(tiny_layerwise_path)
        return MatryoshkaSearch(MatryoshkaReranker(path, devices="cpu", **options)).mteb_model_meta.revision

    own = MatryoshkaSearch(reranker).mteb_model_meta.revision
    assert revision(dtype="float32", batch_size=7) == own
    assert len({own, revision(dtype="bfloat16"), revision(quantization="int8")}) == 3
    assert MatryoshkaSearch(reranker, revision="mine").mteb_model_meta.revision == "mine"


def test_the_name(reranker, tiny_layerwise_path):
    assert MatryoshkaSearch(reranker).mteb_model_meta.name == f"matryoshka/{tiny_layerwise_path.name}"
    assert MatryoshkaSearch(reranker, name="me/mine").mteb_model_meta.name == "me/mine"


def test_what_a_plan_chooses_is_what_is_measured(tiny_layerwise_path, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_layerwise_path.iterdir():
        (model / file.name).symlink_to(file)
    chosen = Setting(6, cascade=((3, 0.5),))
    Plan((2, 3, 4, 5, 6), (), "d/test", 9, "BM25's first 10", (Measurement(chosen, 0.75, 1.0),)).write(
        model / PLAN_NAME
    )
    with pytest.raises(ValueError, match="without a cascade"):
        MatryoshkaReranker(str(model), devices="cpu", budget=0.8)
    Plan(
        (2, 3, 4, 5, 6), (), "d/test", 9, "x", (Measurement(chosen, 0.75, 1.0), Measurement(Setting(3), 0.5, 0.9))
    ).write(model / PLAN_NAME)
    search = MatryoshkaSearch(MatryoshkaReranker(str(model), devices="cpu", budget=0.8))
    assert search.mteb_model_meta.experiment_kwargs["cascade"] == chosen.cascade


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cutoff_layers": 9}, ValueError, r"cutoff_layers \[9\] have no head"),
        ({"cutof_layers": 3}, TypeError, r"unknown arguments \['cutof_layers'\]"),
        ({"normalize": True}, ValueError, r"\['normalize'\] would not change what mteb measures"),
    ],
)
def test_options_are_checked_at_once(reranker, options, error, message):
    with pytest.raises(error, match=message):
        MatryoshkaSearch(reranker, **options)


def test_options_that_mteb_would_not_tell_apart_are_refused(reranker, tmp_path):
    with pytest.raises(ValueError, match=r"encode_kwargs \['cutoff_layers'\]: .*Give them to MatryoshkaSearch"):
        run(MatryoshkaSearch(reranker), MockRerankingTask(), tmp_path, encode_kwargs={"cutoff_layers": 3})


def test_a_candidate_that_is_nowhere_is_named(reranker, tmp_path):
    task = MockRerankingTask()
    task.load_data()
    task.dataset["default"]["test"]["top_ranked"]["q1"] = ["d1", "d9"]
    with pytest.raises(ValueError, match=r"'d9' of query 'q1' is not in the corpus"):
        run(MatryoshkaSearch(reranker), task, tmp_path)


def test_a_query_without_candidates_finds_nothing_and_is_named(reranker, tmp_path, caplog):
    task = MockRerankingTask()
    task.load_data()
    del task.dataset["default"]["test"]["top_ranked"]["q2"]
    _, predictions = run(MatryoshkaSearch(reranker), task, tmp_path)
    assert predictions["default"]["test"]["q2"] == {} and predictions["default"]["test"]["q1"]
    assert "1 queries have no candidates and get no results, such as 'q2'" in caplog.text


PROMPT = "judge by the topic"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = write_causal_lm(tmp_path_factory.mktemp("models") / "Qwen3-Reranker-tiny", initializer_range=0.1)
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu")


def with_prompt(task_class, prompt):
    """A task whose queries have this prompt."""
    task = task_class()
    task.metadata = task.metadata.model_copy(update={"prompt": prompt})
    task.load_data()
    return task


def scores_by(reranker, task, instruction_of):
    data = task.dataset["default"]["test"]
    passages = texts_of(data["corpus"])
    found = {}
    for row in data["queries"]:
        names = data["top_ranked"][row["id"]]
        hits = reranker.rank(row["text"], [passages[name] for name in names], instruction=instruction_of(row))
        found[row["id"]] = {names[hit["corpus_id"]]: pytest.approx(hit["score"], abs=1e-5) for hit in hits}
    return found


def predicted(reranker, task, folder, **options):
    return run(MatryoshkaSearch(reranker, **options), task, folder)[1]["default"]["test"]


def test_a_querys_own_instruction_stands_in_the_templates_place(qwen, tmp_path):
    task = with_prompt(MockInstructionReranking, PROMPT)
    expected = scores_by(qwen, task, lambda row: row["instruction"])
    assert predicted(qwen, task, tmp_path / "own") == expected
    assert predicted(qwen, task, tmp_path / "given", instruction="find heat") == expected


@pytest.mark.parametrize("prompt", [PROMPT, {"query": PROMPT}])
def test_a_tasks_prompt_stands_in_the_templates_place(qwen, prompt, tmp_path):
    task = with_prompt(MockRerankingTask, prompt)
    expected = scores_by(qwen, task, lambda row: PROMPT)
    assert predicted(qwen, task, tmp_path / "task") == expected != scores_by(qwen, task, lambda row: None)
    given = predicted(qwen, task, tmp_path / "given", instruction="find heat")
    assert given == scores_by(qwen, task, lambda row: "find heat") != expected
    loaded = MatryoshkaReranker(qwen.model_name_or_path, dtype="float32", devices="cpu", instruction="find heat")
    assert predicted(loaded, task, tmp_path / "loaded") == given


@pytest.mark.parametrize("prompt", [None, {"document": PROMPT}])
def test_a_task_without_a_prompt_gets_the_checkpoints_own_instruction(qwen, prompt, tmp_path):
    task = with_prompt(MockRerankingTask, prompt)
    assert predicted(qwen, task, tmp_path) == scores_by(qwen, task, lambda row: None)


def test_a_template_without_a_place_does_not_use_a_tasks_prompt(reranker, tmp_path):
    task = with_prompt(MockRerankingTask, PROMPT)
    assert predicted(reranker, task, tmp_path) == scores_by(reranker, task, lambda row: None)
    with pytest.raises(ValueError, match="has no place for the instruction 'find heat'"):
        MatryoshkaSearch(reranker, instruction="find heat")


def test_each_instruction_has_a_cache_of_its_own(qwen):
    options = [{}, {"instruction": "find heat"}, {"instruction": ""}, {"instruction": PROMPT}]
    found = [MatryoshkaSearch(qwen, **given).mteb_model_meta.experiment_kwargs["instruction"] for given in options]
    assert found == ["the task's", "find heat", "", PROMPT]


@pytest.mark.parametrize("name", ["min_score", "score_threshold"])
def test_a_least_score_is_refused(reranker, name):
    with pytest.raises(ValueError, match=rf"\['{name}'\] would leave out candidates"):
        MatryoshkaSearch(reranker, **{name: 0.5})


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """The folder and the scores of a first stage, which did not find d1 for q1."""
    folder = tmp_path_factory.mktemp("first")
    run(mteb.get_model("mteb/baseline-random-encoder"), MockRetrievalTask(), folder)
    (path,) = folder.glob("*_predictions.json")
    written = json.loads(path.read_text())
    split = written["default"]["test"]
    split["q1"] = {"d2": 0.25}
    path.write_text(json.dumps(written))
    return folder, split


def second_stage(folder, candidates=None):
    task = MockRetrievalTask().convert_to_reranking(folder)
    if candidates is not None:
        task.dataset["default"]["test"]["top_ranked"] = candidates
    return task


@pytest.mark.parametrize("options", [{}, CASCADE])
@pytest.mark.parametrize("by_order", [True, False])
def test_a_first_stage_is_fused(reranker, first_stage, options, by_order, tmp_path):
    folder, scores = first_stage
    candidates = {query: ["d1", "d2"] for query in scores}
    task = second_stage(folder, candidates)
    given = {"first_stage": "order"} if by_order else {"first_stage_scores": folder}
    _, found = run(MatryoshkaSearch(reranker, fusion=3.0, **given, **options), task, tmp_path)
    data = task.dataset["default"]["test"]
    queries, passages = texts_of(data["queries"]), texts_of(data["corpus"])
    for query, known in scores.items():
        of_query = given if by_order else {"first_stage_scores": [known.get(name) for name in candidates[query]]}
        texts = [passages[name] for name in candidates[query]]
        hits = reranker.rank(queries[query], texts, fusion=3.0, **of_query, **options)
        result = found["default"]["test"][query]
        assert ranked(result) == [candidates[query][hit["corpus_id"]] for hit in hits]
        expected = [-1.0, -2.0] if options else [hit["fused_score"] for hit in hits]
        assert sorted(result.values(), reverse=True) == pytest.approx(expected, abs=1e-5)
        if by_order or len(known) == 2:  # a weight of 3 decides between two
            assert ranked(result)[0] == ("d1" if by_order else max(known, key=known.get))


def test_candidates_without_a_first_stage_are_refused(reranker, first_stage, tmp_path):
    folder, _ = first_stage
    of_scores = MatryoshkaSearch(reranker, fusion=0.5, first_stage_scores=str(folder))
    with pytest.raises(ValueError, match=r"no score for any of the 1 candidates of query 'q1'"):
        run(of_scores, second_stage(folder, {"q1": ["d1"], "q2": ["d1"]}), tmp_path)
    with pytest.raises(ValueError, match=r"has no scores of task MockRerankingTask, only \['MockRetrievalTask_pred"):
        run(of_scores, MockRerankingTask(), tmp_path)
    for task in (MockRerankingTask(), MockInstructionReranking()):
        with pytest.raises(ValueError, match=rf"first_stage='order': {task.metadata.name} is a task of type"):
            run(MatryoshkaSearch(reranker, fusion=0.5, first_stage="order"), task, tmp_path)


def test_changed_predictions_are_refused(reranker, first_stage, tmp_path):
    folder = tmp_path / "first"
    shutil.copytree(first_stage[0], folder)
    search = MatryoshkaSearch(reranker, fusion=0.5, first_stage_scores=folder)
    (path,) = folder.glob("*_predictions.json")
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match="has changed since MatryoshkaSearch was made"):
        run(search, second_stage(folder), tmp_path)
    path.write_text(json.dumps({"mteb_model_meta": {}, "default": {"dev": {}}}))
    with pytest.raises(ValueError, match="has no scores of subset 'default', split 'val'"):
        run(MatryoshkaSearch(reranker, fusion=0.5, first_stage_scores=folder), second_stage(first_stage[0]), tmp_path)


def test_each_first_stage_and_weight_has_its_own_cache(reranker, first_stage, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(first_stage[0], other)
    options = [
        {},
        {"fusion": 0.5, "first_stage": "order"},
        {"fusion": 1.0, "first_stage": "order"},
        {"fusion": 0.5, "first_stage_scores": other},
    ]
    models = [MatryoshkaSearch(reranker, **given).mteb_model_meta for given in options]
    same = MatryoshkaSearch(reranker, fusion=0.5, first_stage_scores=first_stage[0]).mteb_model_meta
    assert same == models[-1]
    (path,) = other.glob("*_predictions.json")
    path.write_text(path.read_text() + " ")
    models.append(MatryoshkaSearch(reranker, **options[-1]).mteb_model_meta)
    assert len(set(models)) == 5
    assert "fusion" not in models[0].experiment_kwargs and models[2].experiment_kwargs["fusion"] == 1.0


def test_a_default_weight_is_for_a_given_first_stage(tiny_layerwise_path, reranker):
    path = str(tiny_layerwise_path)
    own = MatryoshkaReranker(path, dtype="float32", devices="cpu", fusion=0.7)
    assert MatryoshkaSearch(own).mteb_model_meta == MatryoshkaSearch(reranker).mteb_model_meta
    assert MatryoshkaSearch(own, first_stage="order").mteb_model_meta.experiment_kwargs["fusion"] == 0.7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fusion": 0.5}, ValueError, r"fusion=0\.5 needs the first stage's scores: give first_stage_scores, or"),
        ({"first_stage": "order"}, ValueError, "need a weight"),
        ({"first_stage": "none", "fusion": 1}, ValueError, "first_stage is 'none', but must be 'order' or None"),
        ({"first_stage": "order", "first_stage_scores": "x", "fusion": 1}, ValueError, "give one of them"),
        ({"first_stage_scores": "nothing/there", "fusion": 1}, FileNotFoundError, r"'nothing/there' holds no \*_pred"),
        ({"first_stage_key": "bm25", "fusion": 1}, ValueError, r"\['first_stage_key'\] needs texts with metadata"),
        ({"meta_fields_to_embed": ["title"]}, ValueError, r"\['meta_fields_to_embed'\] needs texts with metadata"),
    ],
)
def test_invalid_fusion_is_refused_at_once(reranker, tiny_layerwise_path, options, error, message):
    for model in (reranker, str(tiny_layerwise_path)):
        with pytest.raises(error, match=message):
            MatryoshkaSearch(model, **options)
