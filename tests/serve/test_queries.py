"""Several queries in one body."""

import json

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.serve.forms import RERANK, parse
from flagembedding_matryoshka.serve.limits import Limits
from tests.qwen import write_causal_lm
from tests.serve.conftest import client_of

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["the flow of energy", "air flows faster over the upper side of a wing.", "what is a heat flux?"]
QUERIES = [
    {"query": "how does a wing lift", "documents": TEXTS},
    {"query": "nothing", "documents": []},
    {"query": "what is heat", "documents": [{"text": text, "number": 7} for text in TEXTS[1:]]},
]


def rankings_of(client, body):
    answer = client.post("/rerank", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["rankings"]


def refused(client, body, path="/rerank"):
    answer = client.post(path, json=body)
    assert answer.status_code == 422, answer.text
    return answer.json()["message"]


def same(results):
    """Results whose scores may differ by rounding."""
    return [
        {name: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value for name, value in result.items()}
        for result in results
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_n": 1, "return_documents": True, "normalize": False, "return_operations": True},
        {"cascade": {"3": 0.5}},
        {"deadline_ms": 3_600_000},
        {"first_stage": "order", "fusion": 0.5},
        {"max_chunks_per_doc": 2, "cutoff_layers": 4, "compress_layers": 2, "compress_ratio": 2},
        {"rank_fields": ["text"], "min_score": 0.4},
    ],
)
def test_the_rankings_are_those_of_each_query_alone(client, options):
    found = client.post("/v2/rerank", json={"queries": QUERIES} | options).json()
    alone = [client.post("/rerank", json=query | options).json() for query in QUERIES]
    assert found["rankings"] == [same(answer["results"]) for answer in alone]
    assert any(found["rankings"])
    assert found["usage"] == {name: sum(answer["usage"][name] for answer in alone) for name in alone[0]["usage"]}
    assert found["meta"]["tokens"]["input_tokens"] == found["usage"]["total_tokens"]


def test_each_query_may_have_first_stage_scores(client):
    scored = [
        query | {"first_stage_scores": [number + 0.5 for number in range(len(query["documents"]))]} for query in QUERIES
    ]
    assert rankings_of(client, {"queries": scored, "fusion": 1}) == [
        same(client.post("/rerank", json=query | {"fusion": 1}).json()["results"]) for query in scored
    ]
    mixed = [QUERIES[0], scored[2]]
    message = refused(client, {"queries": mixed, "fusion": None})
    assert "queries.0 has no first-stage scores, but other queries do" in message
    assert "queries.0: fusion=1.0 needs the first stage's scores" in refused(client, {"queries": mixed, "fusion": 1})
    assert "give each of the queries its own" in refused(client, {"queries": QUERIES, "first_stage_scores": [1]})
    wrong = [scored[0], QUERIES[0] | {"first_stage_scores": [1]}]
    assert "queries.1: first_stage_scores: 1 scores for 3 documents" in refused(client, {"queries": wrong, "fusion": 1})


def test_a_query_may_have_an_instruction(tmp_path_factory):
    path = write_causal_lm(tmp_path_factory.mktemp("models") / "Qwen3-Reranker-tiny", initializer_range=0.1)
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu", max_length=64)
    with client_of(reranker) as client:
        own, of_body = "find proofs", "find opposites"
        queries = [QUERIES[0], QUERIES[0] | {"instruction": own}, QUERIES[0] | {"instruction": ""}]
        found = rankings_of(client, {"queries": queries, "instruction": of_body})
        alone = [
            client.post("/rerank", json=QUERIES[0] | {"instruction": text}).json()["results"]
            for text in (of_body, own, "")
        ]
        assert found == list(map(same, alone))
        assert found[0] != found[1] != found[2]
        message = refused(client, {"queries": [QUERIES[0], QUERIES[0] | {"instruction": "long " * 100}]})
        assert message.startswith("queries.1: ") and "instruction" in message


def test_a_query_without_documents_needs_no_first_stage_scores(reranker, monkeypatch):
    monkeypatch.setattr(reranker, "fusion", 1.0)
    none = {"query": "nothing", "documents": []}
    with client_of(reranker) as client:
        (empty, found) = rankings_of(client, {"queries": [none, QUERIES[0] | {"first_stage_scores": [1, 3, 2]}]})
    assert empty == [] and [hit["first_stage_score"] for hit in found].count(3) == 1
    assert [hit["fused_score"] for hit in found] == sorted((hit["fused_score"] for hit in found), reverse=True)
    assert [hit["relevance_score"] for hit in found] != [hit["model_score"] for hit in found]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"queries": []}, "body.queries: List should have at least 1 item"),
        ({"queries": [QUERIES[0], {"query": "q"}]}, "body.queries.1.documents: Field required"),
        ({"queries": [QUERIES[0], QUERIES[0] | {"cutoff_layers": 3}]}, "body.queries.1.cutoff_layers: Extra inputs"),
        ({"queries": [QUERIES[0], {"query": "q", "documents": ["t", 3]}]}, "body.queries.1.documents.1"),
        ({"queries": [QUERIES[0], {"query": "q", "documents": ["t", {"title": "t"}]}]}, "queries.1: documents.1: "),
        ({"queries": QUERIES, "query": "q"}, "body.query: Extra inputs are not permitted"),
        ({"queries": QUERIES, "texts": TEXTS}, "body.texts: Extra inputs are not permitted"),
        ({"queries": QUERIES, "top_k": 1}, "body.top_k: Extra inputs are not permitted"),
        ({"queries": QUERIES, "instruction": "task"}, "queries.0: "),
        ({"queries": QUERIES, "truncate": False, "max_tokens_per_doc": 4}, "queries.0: "),
    ],
)
def test_errors_name_the_query(client, body, message):
    assert message in refused(client, body)


def test_clients_of_one_query_are_answered_as_before(client):
    body = {"query": "q", "documents": TEXTS, "queries": None}
    assert len(client.post("/rerank", json=body).json()["results"]) == 3
    refused(client, {"queries": QUERIES}, "/infinity/rerank")


def test_the_limit_counts_the_documents_of_all_queries(reranker):
    with client_of(reranker, limits=Limits(documents=4)) as client:
        assert len(rankings_of(client, {"queries": [QUERIES[0], QUERIES[1]]})) == 2
        assert "body: Value error, 6 documents are more than 4" in refused(client, {"queries": QUERIES})
        none = {"query": "q", "documents": []}
        assert "5 documents are more than 4" in refused(client, {"queries": [none] * 5})
        long = {"query": "q", "documents": ["wing and lift " * 60]}
        message = refused(client, {"queries": [long, long], "max_chunks_per_doc": 3})
        assert message == "queries.1: 5 chunks are more than 4"


def test_texts_are_counted_and_dropped_unless_the_answer_repeats_them():
    queries = [{"query": "q" * 10_000, "documents": ["t" * 10_000]}] * 2
    for repeats in (False, True):
        asked = parse(json.dumps({"queries": queries, "return_documents": repeats}).encode(), RERANK, 9)
        assert asked.held_bytes > 40_000
        asked.drop_texts()
        assert (asked.held_bytes > 20_000) == repeats and asked.held_bytes < 25_000
