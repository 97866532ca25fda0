"""Instructions, least scores and what scores mean, as requests say them; what the server says of its checkpoint."""

import json
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.chat_templates import template_from_chat
from flagembedding_matryoshka.inference.arguments import given_options
from flagembedding_matryoshka.inference.calibration import Platt
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan
from flagembedding_matryoshka.serve import Limits
from flagembedding_matryoshka.serve.__main__ import build_parser
from flagembedding_matryoshka.setting import Setting
from tests.inference.test_instructions import CHAT
from tests.qwen import qwen_tokenizer, write_causal_lm
from tests.serve.conftest import client_of, wait_for

pytestmark = pytest.mark.usefixtures("one_thread")
QUERY = "what is a wing?"
TEXTS = ["heat", "a wing of a body", "what is a document? " * 30, "", "the user"]
TASK = "judge by the topic"
NAMED = [
    {"instruction": TASK},
    {"instruct": TASK},
    {"chat_template_kwargs": {"instruction": TASK}},
    {"instruction": TASK, "instruct": TASK, "chat_template_kwargs": {"instruction": TASK}},
    {"instruction": TASK, "instruct": None, "chat_template_kwargs": {}},
]


def load(path, **options):
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", **{"max_length": 256} | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("folder-of-somebody")


@pytest.fixture(scope="module", params=["around the query", "system message"])
def reranker(request, folder):
    path = write_causal_lm(folder / "Qwen3-Reranker-tiny", initializer_range=0.1)
    if request.param == "around the query":
        return load(path)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    return load(path, template=template_from_chat(tokenizer, ["Yes"]).to_json())


@pytest.fixture(scope="module")
def client(reranker):
    with client_of(reranker) as client:
        yield client


@pytest.fixture(scope="module")
def zerank(folder):
    return load(write_causal_lm(folder / "zerank-2", initializer_range=0.1))


@pytest.fixture(scope="module")
def zerank_client(zerank):
    with client_of(zerank) as client:
        yield client


@pytest.fixture(scope="module")
def tiny(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")


@pytest.fixture(scope="module")
def tiny_client(tiny):
    with client_of(tiny) as client:
        yield client


def posted(client, form, **options):
    """The answer in a form that clients of one maker send."""
    bodies = {
        "cohere": {"query": QUERY, "documents": TEXTS},
        "voyage": {"query": QUERY, "documents": TEXTS, "top_k": len(TEXTS)},
        "tei": {"query": QUERY, "texts": TEXTS},
        "score": {"text_1": QUERY, "text_2": TEXTS},
    }
    return client.post("/score" if form == "score" else "/rerank", json=bodies[form] | options)


FORMS = ["cohere", "voyage", "tei", "score"]


def hits_of(answer):
    """(index, score) of the results, the best first."""
    assert answer.status_code == 200, answer.text
    found = answer.json()
    found = found if isinstance(found, list) else found.get("results", found.get("data"))
    return sorted(
        ((hit["index"], hit.get("score", hit.get("relevance_score"))) for hit in found), key=lambda hit: -hit[1]
    )


def hits(ranking):
    return [(hit["corpus_id"], pytest.approx(hit["score"], abs=1e-6)) for hit in ranking]


@pytest.mark.parametrize("form", FORMS)
def test_an_instruction_has_several_names_in_every_form(client, reranker, form):
    expected = hits(reranker.rank(QUERY, TEXTS, instruction=TASK, normalize=True))
    plain = hits(reranker.rank(QUERY, TEXTS, normalize=True))
    assert [score for _, score in expected] != [score for _, score in plain]
    for names in NAMED:
        assert hits_of(posted(client, form, **names)) == expected
    for nothing in ({}, {"instruction": ""}, {"instruct": None}, {"chat_template_kwargs": {"instruction": None}}):
        assert hits_of(posted(client, form, **nothing)) == plain


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instruction": "a", "instruct": "b"}, "instruction and instruct are one option"),
        (
            {"instruct": "a", "chat_template_kwargs": {"instruction": ""}},
            "instruct and chat_template_kwargs.instruction are one option",
        ),
        ({"chat_template_kwargs": {"instruction": "a", "enable_thinking": False}}, "got ['enable_thinking']"),
        ({"chat_template_kwargs": {"instruction": 3}}, "the instruction must be a string, got 3"),
        ({"chat_template_kwargs": "a"}, "chat_template_kwargs"),
        ({"instruction": 3}, "body.instruction"),
        ({"instruction": ["a"]}, "body.instruction"),
        ({"instructions": "a"}, "'instructions' is unknown: do you mean 'instruction'?"),
        ({"instruction": "wing " * 300}, "has more than 256 tokens, the server's max_length"),
    ],
)
def test_instructions_that_say_two_things_or_nothing_are_refused(client, form, options, message):
    answer = posted(client, form, **options)
    assert answer.status_code == 422 and message in answer.json()["message"], answer.text


@pytest.mark.parametrize("form", FORMS)
def test_a_template_without_a_place_refuses_before_anything_is_computed(tiny_client, tiny, form, monkeypatch):
    monkeypatch.setattr(tiny, "score_lists", lambda *_, **__: pytest.fail("something is computed"))
    for names in NAMED:
        answer = posted(tiny_client, form, **names)
        assert answer.status_code == 422
        assert f"template 'cost_wise' has no place for the instruction '{TASK}'" in answer.json()["message"]
    if form == "tei":
        answer = tiny_client.post("/rerank", json={"query": QUERY, "texts": [], "instruction": TASK})
        assert answer.status_code == 422


@pytest.mark.parametrize("options", [{}, {"compress_layers": [2], "compress_ratio": 2}, {"cascade": {"4": 0.5}}])
def test_requests_of_several_instructions_share_batches_and_keep_their_scores(client, reranker, options, monkeypatch):
    instructions = [None, "judge by the topic", "find heat", ""] * 6
    bodies = [
        {"query": QUERY, "texts": [f"{text} {number % 3}" for text in TEXTS], "raw_scores": True, **options}
        | ({} if instruction is None else {"instruction": instruction})
        for number, instruction in enumerate(instructions)
    ]
    alone = [client.post("/rerank", json=body).json() for body in bodies]
    gate, sizes, score_lists = threading.Event(), [], reranker.score_lists

    def waiting(lists, **arguments):
        assert gate.wait(20)
        sizes.append(len(lists))
        return score_lists(lists, **arguments)

    monkeypatch.setattr(reranker, "score_lists", waiting)
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(client.post, "/rerank", json=body) for body in bodies]
        wait_for(client, f"matryoshka_queue_requests {len(bodies)}.0")
        gate.set()
        found = [answer.result().json() for answer in answers]
    assert max(sizes) > 10
    for ours, expected in zip(found, alone, strict=True):
        assert [hit["index"] for hit in ours] == [hit["index"] for hit in expected]
        assert [hit["score"] for hit in ours] == pytest.approx([hit["score"] for hit in expected], abs=1e-6)
    assert alone[0] != alone[1] != alone[2]


def test_the_sigmoid_divides_by_the_templates_temperature(zerank_client, zerank):
    assert zerank.temperature == 5.0
    raw = hits_of(posted(zerank_client, "tei", raw_scores=True, instruction=TASK))
    assert hits(zerank.rank(QUERY, TEXTS, instruction=TASK)) == raw
    shown = hits_of(posted(zerank_client, "tei", instruction=TASK))
    assert shown == [(index, pytest.approx(1 / (1 + math.exp(-score / 5)), abs=1e-9)) for index, score in raw]
    assert shown == hits(zerank.rank(QUERY, TEXTS, instruction=TASK, normalize=True))
    assert hits_of(posted(zerank_client, "score", instruction=TASK)) == shown


def test_an_instructions_tokens_are_counted(client, reranker):
    def tokens(**options):
        return posted(client, "cohere", **options).json()["usage"]["total_tokens"]

    shared, own = reranker.count_tokens(QUERY, TEXTS, instruction=TASK)
    assert tokens(instruction=TASK) == shared + sum(own) != tokens()
    operations = posted(client, "cohere", instruction=TASK, return_operations=True).json()["usage"]["operations"]
    assert operations == reranker.estimate_flops(reranker.tokenize([(QUERY, text) for text in TEXTS], instruction=TASK))


@pytest.mark.parametrize("options", [{}, {"truncation_direction": "left"}])
def test_lengths_count_the_instruction(client, reranker, options):
    long = f"{TASK}, {TASK} and {TASK}"
    plain, instructed = (
        max(map(len, reranker.tokenize([(QUERY, text) for text in TEXTS], instruction=one))) for one in ("", long)
    )
    assert instructed > plain
    body = {"query": QUERY, "texts": TEXTS, "truncate_prompt_tokens": plain, **options}
    assert not any("is_truncated" in hit for hit in client.post("/rerank", json=body | {"instruction": ""}).json())
    (cut,) = [hit for hit in client.post("/rerank", json=body | {"instruction": long}).json() if "is_truncated" in hit]
    assert TEXTS[cut["index"]] == max(TEXTS, key=len)
    refused = client.post("/rerank", json=body | {"instruction": long, "truncate": False})
    assert refused.status_code == 422 and f"{instructed} tokens" in refused.json()["message"]
    shared, (empty,) = reranker.count_tokens(QUERY, [""], instruction=long)
    no_room = client.post("/rerank", json=body | {"instruction": long, "truncate_prompt_tokens": shared + empty})
    assert no_room.status_code == 422 and "leaves no room" in no_room.json()["message"]


def test_chunks_stand_beside_the_instruction(client, reranker):
    document = " ".join(f"sentence {number} of a wing." for number in range(90))
    body = {"query": QUERY, "documents": [document], "instruction": TASK, "overlap": 0, "raw_scores": True}
    (found,) = client.post("/rerank", json=body).json()["results"]
    (expected,) = reranker.rank(QUERY, [document], instruction=TASK, chunk=True)
    assert found["chunk"] == expected["chunk"] and found["relevance_score"] == pytest.approx(
        expected["score"], abs=1e-6
    )
    assert len(reranker.cut_chunks(QUERY, [document], instruction=TASK)[0].chunks) > 1


RANKING = FORMS[:3]
SHOWN = [{}, {"raw_scores": True}, {"use_activation": False}, {"normalize": True}, {"normalize": False}]


@pytest.mark.parametrize("form", RANKING)
@pytest.mark.parametrize("shown", SHOWN)
def test_min_score_is_compared_with_the_score_that_is_shown(zerank_client, form, shown):
    every = hits_of(posted(zerank_client, form, **shown))
    least = every[2][1]
    assert hits_of(posted(zerank_client, form, min_score=least, **shown)) == every[:3]
    assert hits_of(posted(zerank_client, form, min_score=every[0][1] + 1, **shown)) == []
    assert hits_of(posted(zerank_client, form, min_score=-1000, **shown)) == every
    if form != "voyage":
        assert hits_of(posted(zerank_client, form, min_score=least, top_n=2, **shown)) == every[:2]
        assert hits_of(posted(zerank_client, form, min_score=least, top_n=4, **shown)) == every[:3]


def test_normalize_false_is_raw_and_true_the_sigmoid(zerank_client):
    raw, shown = (hits_of(posted(zerank_client, "tei", **how)) for how in ({"raw_scores": True}, {}))
    assert raw != shown
    assert hits_of(posted(zerank_client, "tei", normalize=False)) == raw
    assert hits_of(posted(zerank_client, "tei", normalize=True)) == shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_score": 0.5, "cascade": {"4": 0.5}}, "min_score=0.5 beside cascade={4: 0.5}: scores of different exits"),
        ({"min_score": 0.5, "deadline_ms": 9000}, "min_score=0.5 beside deadline_ms=9000: scores of different exits"),
        ({"min_score": 0.5, "cascade": {"4": 0.5}, "raw_scores": True}, "min_score=0.5 beside cascade"),
        ({"min_score": "0.5"}, "body.min_score"),
        ({"min_score": True}, "body.min_score"),
        ({"min_scores": 0.5}, "do you mean 'min_score'?"),
        ({"normalize": "calibrate"}, "body.normalize"),
        ({"normalize": True, "raw_scores": True}, "normalize and raw_scores or use_activation are one option"),
        (
            {"normalize": "calibrated", "use_activation": True},
            "normalize and raw_scores or use_activation are one option",
        ),
        ({"normalize": "calibrated"}, "the model has no plan"),
    ],
)
@pytest.mark.parametrize("form", RANKING)
def test_scores_that_cannot_be_shown_or_compared_are_refused(zerank_client, folder, form, options, message):
    answer = posted(zerank_client, form, **options)
    assert answer.status_code == 422 and message in answer.json()["message"], answer.text
    assert folder.name not in answer.text


def test_score_answers_every_pair(zerank_client):
    answer = posted(zerank_client, "score", min_score=0.5)
    assert answer.status_code == 422 and "/score answers every pair" in answer.json()["message"]


@pytest.fixture(scope="module")
def calibrated(folder):
    path = write_causal_lm(folder / "calibrated" / "zerank-2", initializer_range=0.1)
    plain = load(path)
    options = plain.scored_with(ScoringOptions.resolve(plain, {}))
    shallow, deep = Platt(0.25, -0.5), Platt(0.5, 0.25)
    measured = (Measurement(Setting(6), 1.0, 1.0, 1.0, deep), Measurement(Setting(4), 0.7, 0.9, 0.9, shallow))
    plan = Plan((4, 5, 6), (), "d/test", 9, "all", measured, held_out_queries=8, scored_with=options)
    plan.write(path / PLAN_NAME)
    return load(path)


def test_min_score_of_probabilities(calibrated):
    options = {"cascade": {4: 0.5}}
    with client_of(calibrated) as client:
        for given in ({}, options):
            expected = calibrated.rank(QUERY, TEXTS, normalize="calibrated", **given)
            body = {"query": QUERY, "texts": TEXTS, "normalize": "calibrated", **given}
            found = [(hit["index"], hit["score"]) for hit in client.post("/rerank", json=body).json()]
            assert found == hits(expected)
            least = sorted(score for _, score in found)[2]
            kept = client.post("/rerank", json=body | {"min_score": least}).json()
            assert [(hit["index"], hit["score"]) for hit in kept] == [hit for hit in found if hit[1] >= least]
        other = client.post("/rerank", json=body | {"instruction": TASK})
        assert other.status_code == 422 and "was measured with instruction" in other.json()["message"]
        unknown = client.post("/rerank", json=body | {"cutoff_layers": 5})
        assert unknown.status_code == 422 and "no calibration of 5 layers" in unknown.json()["message"]
        raw = client.post("/rerank", json={"query": QUERY, "texts": TEXTS, "raw_scores": True}).json()
    assert [(hit["index"], hit["score"]) for hit in raw] == hits(calibrated.rank(QUERY, TEXTS))


def test_a_score_with_a_meaning_of_its_own_is_not_degraded(calibrated, monkeypatch):
    gate, score_lists = threading.Event(), calibrated.score_lists

    def waiting(lists, **arguments):
        assert gate.wait(20)
        return score_lists(lists, **arguments)

    body = {"query": QUERY, "texts": TEXTS}
    own = [{"min_score": -1000.0}, {"normalize": "calibrated"}]
    monkeypatch.setattr(calibrated, "score_lists", waiting)
    with client_of(calibrated, limits=Limits(requests=8, degrade_to=4)) as client, ThreadPoolExecutor(8) as pool:
        before = [pool.submit(client.post, "/rerank", json=body) for _ in range(5)]
        wait_for(client, "matryoshka_queue_requests 5.0")
        later = [pool.submit(client.post, "/rerank", json=body | options) for options in ({}, *own)]
        wait_for(client, "matryoshka_queue_requests 8.0")
        gate.set()
        degraded, *kept = (answer.result().json() for answer in later)
        assert all(answer.result().status_code == 200 for answer in before)
    assert {hit["cutoff_layer"] for hit in degraded} == {4}
    assert not any("cutoff_layer" in hit for answer in kept for hit in answer)


def test_the_information_has_the_checkpoints_description(client, reranker, folder):
    answer = client.get("/info")
    facts = answer.json()["checkpoint"]
    assert all(set(fact) == {"value", "source"} for fact in facts.values())
    assert facts["architecture"] == {"value": "causal language model", "source": "architectures in config.json"}
    assert facts["backbone"]["value"] == "qwen3" and facts["exits"]["value"] == [4, 5, 6]
    assert facts["template"]["value"] == reranker.description.template.value.to_json()
    assert {"instruction", "activation", "head_tokens", "dtype", "quantization", "template_name"} <= set(facts)
    assert folder.name not in answer.text and str(folder.parent) not in answer.text


@pytest.mark.parametrize(
    "trained_at",
    ["/home/somebody/my models/Qwen3-Reranker-0.6B", "C:\\models\\Qwen3-Reranker-0.6B", "a/Qwen3-Reranker-0.6B"],
)
def test_the_information_names_no_folder_of_a_checkpoint(tmp_path, trained_at):
    path = write_causal_lm(tmp_path / "mine")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"_name_or_path": trained_at}))
    with client_of(load(path)) as client:
        answer = client.get("/info")
    assert answer.json()["checkpoint"]["template_name"] == {
        "value": "qwen3-reranker",
        "source": "_name_or_path in config.json: Qwen3-Reranker-0.6B",
    }
    assert not any(part in answer.text for part in ("home", "models", "C:", "a/"))


def test_the_servers_own_instruction_is_that_of_requests_without_one(folder):
    line = ["--model", str(folder / "Qwen3-Reranker-tiny"), "--template", "zerank", "--instruction", TASK]
    options = given_options(build_parser().parse_args(line))
    assert options == {"template": "zerank", "instruction": TASK}
    write_causal_lm(folder / "Qwen3-Reranker-tiny", initializer_range=0.1)
    served, plain = (load(folder / "Qwen3-Reranker-tiny", **own) for own in (options, {"template": "zerank"}))
    with client_of(served) as client:
        assert hits_of(posted(client, "tei")) == hits(plain.rank(QUERY, TEXTS, instruction=TASK, normalize=True))
        assert hits_of(posted(client, "tei", instruction="")) == hits(plain.rank(QUERY, TEXTS, normalize=True))
        facts = client.get("/info").json()["checkpoint"]
    assert facts["instruction"] == {"value": TASK, "source": "the server's --instruction"}
    assert facts["template_name"] == {"value": "zerank", "source": "the caller"}


@contextmanager
def warned():
    with pytest.warns(UserWarning, match="nothing in .* says which template"):
        yield


def test_an_assumed_template_is_said_once_in_the_log(tmp_path, zerank, caplog):
    path = write_causal_lm(tmp_path / "mine")
    with warned():
        assumed = load(path)
    with caplog.at_level(logging.WARNING), client_of(assumed) as client:
        for _ in range(3):
            assert posted(client, "tei").status_code == 200
    assert [record.levelname for record in caplog.records if "'cost_wise' is assumed" in record.message] == ["WARNING"]
    caplog.clear()
    with caplog.at_level(logging.WARNING), client_of(zerank):
        assert "assumed" not in caplog.text


def test_the_document_explains_the_options(client):
    document = client.get("/openapi.json").json()
    body = document["paths"]["/rerank"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for form in body["anyOf"]:
        for name in ("instruction", "instruct", "chat_template_kwargs", "min_score", "normalize"):
            assert form["properties"][name]["description"]
        kwargs = form["properties"]["chat_template_kwargs"]["anyOf"][0]
        assert kwargs["additionalProperties"] is False and list(kwargs["properties"]) == ["instruction"]
