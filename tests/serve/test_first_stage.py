"""Requests with the first stage's scores, in every form that ranks."""

import json
import math
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan
from flagembedding_matryoshka.serve import Limits
from flagembedding_matryoshka.serve.forms.common import RequestScores
from flagembedding_matryoshka.setting import Setting
from tests.pages import blocks
from tests.serve.conftest import client_of, wait_for

pytestmark = pytest.mark.usefixtures("one_thread")
QUERY = "how does a wing lift"
WORDS = ["wing", "flow", "air", "heat", "shock", "plate"]
TEXTS = [" ".join(WORDS[(5 * i + j) % 6] for j in range(1 + 3 * i % 7)) for i in range(12)]
FIRST = [round(10 * math.sin(3 * number), 2) for number in range(12)]
FORMS = ["cohere", "objects", "voyage", "tei"]
DEPTHS = [
    {},
    {"cutoff_layers": 3},
    {"compress_layers": [2], "compress_ratio": 2},
    {"cascade": {"2": 0.5, "4": 0.2}},
    {"deadline_ms": 3_600_000},
    {"cascade": {"3": 0.4}, "deadline_ms": 3_600_000},
]


def body_of(form, texts=TEXTS, first=FIRST, **options):
    """A request as clients of one maker send it, with the first stage's scores in the way that suits it."""
    if form == "objects":
        documents = [
            {"text": text, "id": number} | ({} if score is None else {"first_stage_score": score})
            for number, (text, score) in enumerate(zip(texts, first, strict=True))
        ]
        return {"query": QUERY, "documents": documents, **options}
    own = {"first_stage_scores": first} | ({"top_k": len(texts)} if form == "voyage" else {})
    return {"query": QUERY, "texts" if form == "tei" else "documents": texts} | own | options


def results_of(answer):
    """Index, shown score and all else of each result, in the answer's order."""
    assert answer.status_code == 200, answer.text
    found = answer.json()
    results = found if isinstance(found, list) else found.get("results", found.get("data"))
    return [hit | {"shown": hit.pop("score" if isinstance(found, list) else "relevance_score")} for hit in results]


def asked(client, form, **options):
    return results_of(client.post("/rerank", json=body_of(form, **options)))


def arguments(options):
    """Options of a request as `rank` takes them."""
    cascade = options.get("cascade")
    return options | ({} if cascade is None else {"cascade": {int(layer): share for layer, share in cascade.items()}})


def like(results, hits, shown="model_score"):
    """Whether an answer is a ranking of the re-ranker."""
    assert [hit["index"] for hit in results] == [hit["corpus_id"] for hit in hits]
    for result, hit in zip(results, hits, strict=True):
        assert result[shown] == pytest.approx(hit["score"], abs=1e-5)
        assert result["first_stage_score"] == hit["first_stage_score"]
        assert result["fused_score"] == pytest.approx(hit["fused_score"], abs=1e-3)
        assert result.get("cutoff_layer") == hit.get("cutoff_layer")


@pytest.mark.parametrize("options", DEPTHS)
def test_every_form_ranks_as_the_library(client, reranker, options):
    expected = reranker.rank(QUERY, TEXTS, first_stage_scores=FIRST, fusion=0.7, normalize=True, **arguments(options))
    plain = reranker.rank(QUERY, TEXTS, **arguments(options))
    assert [hit["corpus_id"] for hit in expected] != [hit["corpus_id"] for hit in plain]
    for form in FORMS:
        like(asked(client, form, fusion=0.7, **options), expected)


@pytest.mark.parametrize("options", DEPTHS)
@pytest.mark.parametrize("shown", [{}, {"raw_scores": True}])
def test_sorting_by_the_shown_score_keeps_the_order(client, options, shown):
    for weight in (0, 0.5, 40, 1e6):
        for form in ("cohere", "tei"):
            results = asked(client, form, fusion=weight, **options, **shown)
            scores = [hit["shown"] for hit in results]
            assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
            if not shown:
                assert all(0 < score < 1 for score in scores)


@pytest.mark.parametrize("is_raw", [True, False])
def test_shown_scores_of_two_exits_do_not_overlap(is_raw):
    draw = random.Random(0)
    for weight in (0.0, 0.35, 1e6):
        for _ in range(50):
            hits = [
                {"score": 0.0, "cutoff_layer": draw.choice([2, 3, 4]), "fused_score": draw.gauss(0, 1 + weight)}
                for _ in range(20)
            ]
            scored = RequestScores([hits], 0, "m", lambda score, layer: score, 4, fusion=weight, is_raw=is_raw)
            found = scored.best("shown", None)
            keys = [(-hit["cutoff_layer"], -hit["fused_score"]) for hit in found]
            scores = [hit["shown"] for hit in found]
            assert keys == sorted(keys) and scores == sorted(set(scores), reverse=True)
            if is_raw:
                deepest = [hit for hit in found if hit["cutoff_layer"] == 4]
                assert [hit["shown"] for hit in deepest] == [hit["fused_score"] for hit in deepest]


def test_the_shown_score_at_one_exit(client):
    results = asked(client, "cohere", fusion=0.7)
    raw = asked(client, "cohere", fusion=0.7, raw_scores=True)
    for hit, other in zip(results, raw, strict=True):
        assert hit["shown"] == pytest.approx(1 / (1 + math.exp(-hit["fused_score"] / 1.7)), abs=1e-6)
        assert other["shown"] == other["fused_score"] == pytest.approx(hit["fused_score"], abs=1e-4)
        assert hit["model_score"] == pytest.approx(1 / (1 + math.exp(-other["model_score"])), abs=1e-6)
    plain = results_of(client.post("/rerank", json={"query": QUERY, "documents": TEXTS}))
    assert {hit["index"]: hit["shown"] for hit in plain} == pytest.approx(
        {hit["index"]: hit["model_score"] for hit in results}, abs=1e-6
    )
    assert not any(name in hit for hit in plain for name in ("model_score", "fused_score", "first_stage_score"))


@pytest.mark.parametrize("options", DEPTHS)
def test_the_order_of_the_documents_is_a_first_stage(client, reranker, options):
    expected = reranker.rank(QUERY, TEXTS, first_stage="order", fusion=0.7, normalize=True, **arguments(options))
    for form, own in (("cohere", {}), ("tei", {}), ("voyage", {"top_k": 12})):
        body = {"query": QUERY, "texts" if form == "tei" else "documents": TEXTS, "first_stage": "order", "fusion": 0.7}
        like(results_of(client.post("/rerank", json=body | own | options)), expected)


@pytest.mark.parametrize("options", [DEPTHS[0], DEPTHS[3]])
def test_a_document_without_a_score_gets_the_lowest(client, reranker, options):
    first = [None if number % 3 else score for number, score in enumerate(FIRST)]
    expected = reranker.rank(QUERY, TEXTS, first_stage_scores=first, fusion=0.7, normalize=True, **arguments(options))
    for form in FORMS:  # null in lists; objects lack the field
        like(asked(client, form, first=first, fusion=0.7, **options), expected)
    body = body_of("objects", first=first, fusion=0.7)
    body["documents"][1]["first_stage_score"] = None
    body["documents"][2] = TEXTS[2]
    like(results_of(client.post("/rerank", json=body | options)), expected)
    nothing = [{"text": text, "first_stage_score": None} for text in TEXTS]
    results = results_of(client.post("/rerank", json={"query": QUERY, "documents": nothing, "fusion": 9}))
    assert [hit["index"] for hit in results] == [hit["corpus_id"] for hit in reranker.rank(QUERY, TEXTS)]


@pytest.mark.parametrize("form", ["cohere", "voyage", "tei"])
def test_top_n_cuts_the_fused_order_and_min_score_the_models_score(client, form):
    every = asked(client, form, fusion=3)
    name = "top_k" if form == "voyage" else "top_n"
    assert asked(client, form, fusion=3, **{name: 4}) == every[:4]
    least = sorted(hit["model_score"] for hit in every)[7]
    kept = asked(client, form, fusion=3, min_score=least)
    assert kept == [hit for hit in every if hit["model_score"] >= least] and len(kept) == 5
    assert kept[2] not in every[:3]
    assert asked(client, form, fusion=3, min_score=least, **{name: 3}) == kept[:3]


@pytest.mark.parametrize("options", [{}, {"cascade": {"2": 0.6, "4": 0.3}}])
def test_a_chunk_has_the_first_stage_score_of_its_document(client, reranker, options):
    texts, first = ["air", " ".join(WORDS * 30), "heat", " ".join(WORDS[::-1] * 25)], [1.0, 5.0, 8.0, -3.0]
    expected = reranker.rank(
        QUERY, texts, first_stage_scores=first, fusion=0.6, normalize=True, chunk=True, **arguments(options)
    )
    results = asked(client, "cohere", texts=texts, first=first, fusion=0.6, overlap=0, **options)
    like(results, expected)
    assert [hit["chunk"] for hit in results] == [hit["chunk"] for hit in expected]
    assert any(hit["chunk"]["start"] for hit in results) or options == {}


def test_objects_are_returned_unchanged(client):
    body = body_of("objects", fusion=0.7, return_documents=True)
    for hit in results_of(client.post("/v2/rerank", json=body)):
        assert hit["document"] == body["documents"][hit["index"]]
    ranked = results_of(client.post("/rerank", json=body | {"rank_fields": ["text"]}))
    assert ranked == results_of(client.post("/rerank", json=body))


@pytest.mark.parametrize("form", FORMS)
def test_no_documents_are_no_results(client, form):
    assert asked(client, form, texts=[], first=[], fusion=0.7, **({"top_k": 1} if form == "voyage" else {})) == []


@pytest.mark.parametrize("cascade", [None, {"2": 0.5, "4": 0.2}])
def test_requests_in_one_queue_keep_their_own_scores(reranker, cascade, gate):
    depth = {} if cascade is None else {"cascade": cascade}
    bodies = [body_of("cohere", fusion=weight, **depth) for weight in (0.2, 0.7)]
    bodies += [body_of("cohere", first=FIRST[::-1], fusion=0.7, **depth), {"query": QUERY, "documents": TEXTS} | depth]
    bodies += [body_of("cohere", fusion=0.7, **depth, deadline_ms=3_600_000)]
    with client_of(reranker) as client, ThreadPoolExecutor(20) as pool:
        gate.set()
        alone = [results_of(client.post("/rerank", json=body)) for body in bodies]
        gate.clear()
        answers = [pool.submit(client.post, "/rerank", json=body) for body in bodies * 4]
        wait_for(client, "matryoshka_queue_requests 20.0")
        gate.set()
        together = [results_of(answer.result()) for answer in answers]
    for number, results in enumerate(together):
        expected = alone[number % len(bodies)]
        assert [hit["index"] for hit in results] == [hit["index"] for hit in expected]
        assert [hit["shown"] for hit in results] == pytest.approx([hit["shown"] for hit in expected], abs=1e-4)
    assert len({tuple(hit["index"] for hit in results) for results in alone[:4]}) == 4


def test_a_request_with_a_short_deadline_ranks_by_fused_scores_at_the_first_exit(client, reranker):
    expected = reranker.rank(QUERY, TEXTS, cutoff_layers=2, first_stage_scores=FIRST, fusion=0.7)
    results = asked(client, "cohere", fusion=0.7, deadline_ms=0.001)
    assert {hit["cutoff_layer"] for hit in results} == {2}
    assert [hit["index"] for hit in results] == [hit["corpus_id"] for hit in expected]


def test_a_full_queue_sheds_depth_and_keeps_the_fused_order(reranker, gate):
    body = body_of("tei", fusion=0.7)
    with client_of(reranker, limits=Limits(requests=4, degrade_to=3)) as client, ThreadPoolExecutor() as pool:
        early = []
        for count in (1, 2, 3):
            early.append(pool.submit(client.post, "/rerank", json=body))
            wait_for(client, f"matryoshka_queue_requests {count}.0")
        late = pool.submit(client.post, "/rerank", json=body)
        wait_for(client, "matryoshka_queue_requests 4.0")
        gate.set()
        degraded = results_of(late.result())
        assert all(answer.result().status_code == 200 for answer in early)
    expected = reranker.rank(QUERY, TEXTS, cutoff_layers=3, first_stage_scores=FIRST, fusion=0.7)
    assert {hit["cutoff_layer"] for hit in degraded} == {3}
    assert [hit["index"] for hit in degraded] == [hit["corpus_id"] for hit in expected]


OBJECTS = [{"text": text, "first_stage_score": score} for text, score in zip(TEXTS, FIRST, strict=True)]
DIGITS = int("9" * 400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_stage_scores": FIRST}, "first_stage_scores and first_stage need a weight: give fusion="),
        ({"first_stage": "order"}, "first_stage_scores and first_stage need a weight: give fusion="),
        ({"documents": OBJECTS}, "first_stage_scores and first_stage need a weight: give fusion="),
        ({"fusion": 0.5}, "fusion=0.5 needs the first stage's scores: give first_stage_scores, a first_stage_score in"),
        ({"fusion": "auto"}, "fusion='auto' needs the first stage's scores"),
        ({"first_stage_scores": FIRST, "fusion": "auto"}, "fusion='auto': the model has no plan"),
        ({"first_stage_scores": FIRST, "fusion": -0.5}, "body.fusion"),
        ({"first_stage_scores": FIRST, "fusion": 2e6}, "less than or equal to 1000000"),
        ({"first_stage_scores": FIRST, "fusion": "0.5"}, "body.fusion"),
        ({"first_stage_scores": FIRST, "fusion": True}, "body.fusion"),
        ({"first_stage_scores": FIRST, "fusion": math.nan}, "body.fusion"),
        ({"first_stage_scores": FIRST[1:], "fusion": 1}, "first_stage_scores: 11 scores for 12 documents"),
        ({"first_stage_scores": 3, "fusion": 1}, "body.first_stage_scores"),
        ({"first_stage_scores": [*FIRST[:5], "7", *FIRST[6:]], "fusion": 1}, "body.first_stage_scores.5"),
        ({"first_stage_scores": [*FIRST[:5], math.inf, *FIRST[6:]], "fusion": 1}, "body.first_stage_scores.5"),
        ({"first_stage_scores": [*FIRST[:5], DIGITS, *FIRST[6:]], "fusion": 1}, "body.first_stage_scores.5"),
        ({"first_stage_scores": [True] * 12, "fusion": 1}, "body.first_stage_scores.0"),
        ({"first_stage": "ranks", "fusion": 1}, "body.first_stage"),
        ({"first_stage": "order", "first_stage_scores": FIRST, "fusion": 1}, "in one of these ways"),
        (
            {"documents": OBJECTS, "first_stage": "order", "fusion": 1},
            "first_stage='order' and the first_stage_score of",
        ),
        ({"documents": OBJECTS, "first_stage_scores": FIRST, "fusion": 1}, "first_stage_scores and the first_stage_sc"),
        ({"documents": [*TEXTS, {"text": "t", "first_stage_score": "7"}], "fusion": 1}, "12.first_stage_score must be"),
        (
            {"documents": [*TEXTS, {"text": "t", "first_stage_score": True}], "fusion": 1},
            "12.first_stage_score must be",
        ),
        ({"documents": [{"text": "t", "first_stage_score": math.nan}], "fusion": 1}, "0.first_stage_score is nan"),
        (
            {"documents": [{"text": "t", "first_stage_score": DIGITS}], "fusion": 1},
            "documents.0.first_stage_score is 99",
        ),
        ({"documents": OBJECTS, "fusion": 1, "rank_fields": ["first_stage_score"]}, "and not a text"),
        ({"first_stage_score": FIRST, "fusion": 1}, "do you mean 'first_stage_scores'?"),
        ({"first_stages": "order"}, "do you mean 'first_stage'?"),
        ({"fusions": 1}, "do you mean 'fusion'?"),
    ],
)
def test_invalid_fusion_is_refused_before_computation(client, reranker, options, message, monkeypatch):
    monkeypatch.setattr(reranker, "score_lists", lambda *_, **__: pytest.fail("something is computed"))
    bodies = [{"query": QUERY, "documents": TEXTS} | options]
    bodies += [] if "documents" in options else [{"query": QUERY, "texts": TEXTS} | options]
    for body in bodies:
        answer = client.post("/rerank", content=json.dumps(body))
        assert answer.status_code == 422 and message in answer.json()["message"], answer.text


@pytest.mark.parametrize("options", [{"first_stage_scores": [1.0]}, {"first_stage": "order"}, {"fusion": 0.5}])
def test_score_refuses_fusion(client, options):
    answer = client.post("/score", json={"text_1": QUERY, "text_2": ["air"]} | options)
    message = f"{next(iter(options))} change the order of a ranking; /score answers every pair"
    assert answer.status_code == 422 and message in answer.json()["message"]


@pytest.fixture(scope="module")
def planned_path(tiny_layerwise_path, tmp_path_factory):
    """A model whose plan has a weight."""

    path = shutil.copytree(tiny_layerwise_path, tmp_path_factory.mktemp("folder-of-somebody") / "planned")
    shares = {Setting(6): (1.0, 1.0), Setting(4): (0.6, 0.8), Setting(4, cascade={2: 0.5}): (0.5, 0.9)}
    measured = tuple(Measurement(setting, cost, ndcg, ndcg) for setting, (cost, ndcg) in shares.items())
    Plan((2, 3, 4, 5, 6), (), "d/test", 9, "all", measured, fusion=0.7).write(path / PLAN_NAME)
    return path


def load(path, **options):
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", max_length=64, **options)


@pytest.mark.filterwarnings("ignore:.*names no weights")
def test_the_weight_of_the_plan(planned_path, reranker):
    expected = reranker.rank(QUERY, TEXTS, first_stage_scores=FIRST, fusion=0.7, normalize=True)
    with client_of(load(planned_path)) as client:
        assert client.get("/info").json()["fusion"] == {"default": None, "plan": 0.7}
        like(asked(client, "cohere", fusion="auto"), expected)
        assert client.post("/rerank", json=body_of("cohere")).status_code == 422
    for options, default in (({"fusion": "auto"}, 0.7), ({"fusion": 0.7}, 0.7), ({"budget": 1.0}, 0.7)):
        with client_of(load(planned_path, **options)) as client:
            assert client.get("/info").json()["fusion"] == {"default": default, "plan": 0.7}
            like(asked(client, "cohere"), expected)
            other = asked(client, "cohere", fusion=0)
            assert [hit["index"] for hit in other] == [hit["corpus_id"] for hit in reranker.rank(QUERY, TEXTS)]


@pytest.mark.filterwarnings("ignore:.*names no weights")
def test_the_cascade_of_the_plan_drops_by_fused_scores(planned_path):
    planned = load(planned_path, budget=0.6)
    expected = planned.rank(QUERY, TEXTS, first_stage_scores=FIRST, normalize=True)
    assert {hit["cutoff_layer"] for hit in expected} == {2, 4}
    with client_of(planned) as client:
        like(asked(client, "cohere"), expected)


@pytest.mark.filterwarnings("ignore:.*names no weights")
def test_the_presets_are_those_of_the_plan(planned_path):
    planned = load(planned_path)
    with client_of(planned) as client:
        presets = client.get("/info").json()["presets"]
    for name, quality in (("fast", 0.95), ("balanced", 0.99)):
        setting = planned.plan.choose(quality=quality)
        cascade = {str(layer): share for layer, share in setting.cascade}
        fields = {key: value for key, value in setting.arguments.items() if key != "store_layer"}
        assert presets[name] == fields | {"cascade": cascade} and not setting.store_layer
    assert presets["full"]["cutoff_layers"] == [6] and not presets["full"]["cascade"]


def test_the_information_of_a_model_without_a_plan(client):
    assert client.get("/info").json()["fusion"] == {"default": None, "plan": None}


@pytest.mark.filterwarnings("ignore:.*names no weights")
def test_a_plan_without_a_weight(planned_path, tmp_path):

    path = shutil.copytree(planned_path, tmp_path / "planned")
    Plan((2, 3, 4, 5, 6), (), "d/test", 9, "all", (Measurement(Setting(6), 1.0, 1.0, 1.0),)).write(path / PLAN_NAME)
    with client_of(load(path)) as client:
        assert client.get("/info").json()["fusion"] == {"default": None, "plan": None}
        answer = client.post("/rerank", json=body_of("cohere", fusion="auto"))
    assert answer.status_code == 422 and "the plan of d/test has no fusion weight" in answer.json()["message"]
    assert "planned" not in answer.text


def test_the_document_explains_the_fields(client):
    document = client.get("/openapi.json").json()
    described = document["paths"]["/rerank"]["post"]
    for form in described["requestBody"]["content"]["application/json"]["schema"]["anyOf"]:
        assert all(form["properties"][name]["description"] for name in ("first_stage_scores", "first_stage", "fusion"))
        numbers, word, _ = form["properties"]["fusion"]["anyOf"]
        assert numbers == {"type": "number", "minimum": 0, "maximum": 1e6} and word["const"] == "auto"
        if "documents" in form["properties"]:
            _, item = form["properties"]["documents"]["items"]["anyOf"]
            assert item["properties"]["first_stage_score"] == {"anyOf": [{"type": "number"}, {"type": "null"}]}
    answer = described["responses"]["200"]["content"]["application/json"]["schema"]
    models = document["components"]["schemas"]
    assert [part.get("$ref", part.get("type")) for part in answer["anyOf"]] == [
        "#/components/schemas/CohereAnswer",
        "#/components/schemas/VoyageAnswer",
        "array",
        "#/components/schemas/QueriesAnswer",
    ]
    for name in ("CohereResult", "VoyageResult", "TeiResult"):
        assert {"model_score", "first_stage_score", "fused_score"} <= set(models[name]["properties"])


def test_the_pages_request_gets_an_answer_of_the_form_that_it_shows(client):
    body, shown = (json.loads(block) for block in blocks("docs/serving.md", "json") if "first_stage_score" in block)
    results = client.post("/rerank", json=body).json()["results"]
    assert [list(hit) for hit in results] == [list(hit) for hit in shown["results"]]
    first = {number: one.get("first_stage_score", 7.1) for number, one in enumerate(body["documents"])}
    for hit in [*results, *shown["results"]]:
        assert hit["first_stage_score"] == first[hit["index"]]
        fused = hit["fused_score"] / (1 + body["fusion"])
        assert hit["relevance_score"] == pytest.approx(1 / (1 + math.exp(-fused)), abs=1e-4)
