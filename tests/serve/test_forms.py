"""What clients of several makers send, and what they read."""

import json
import logging

import pytest

from flagembedding_matryoshka.serve.limits import Limits
from flagembedding_matryoshka.serve.truncation import Truncator
from flagembedding_matryoshka.text.encoding import TextEncoder
from tests.serve.conftest import client_of

pytestmark = pytest.mark.usefixtures("one_thread")
QUERY = "how does a wing lift"
TEXTS = ["the flow of energy", "air flows faster over the upper side of a wing.", "what is a heat flux? " * 9]


def order(answer, score="score"):
    return [(hit["index"], hit[score]) for hit in answer]


def tokens_of(reranker, query, text):
    shared, (own,) = reranker.count_tokens(query, [text], max_length=10_000, query_max_length=10_000)
    return shared + own


@pytest.fixture
def computed(reranker, monkeypatch):
    """(query, documents) of what the model computes."""
    calls, truncate = [], Truncator.truncate

    def noting(*arguments):
        found = truncate(*arguments)
        calls.append((found.query, found.documents))
        return found

    monkeypatch.setattr(Truncator, "truncate", noting)
    return calls


def test_ragflows_strings_are_booleans(client):
    body = {"query": QUERY, "documents": TEXTS, "return_documents": "true", "return_len": "True", "raw_scores": "false"}
    results = client.post("/v1/rerank", json=body).json()["results"]
    assert {result["document"]["text"] for result in results} == set(TEXTS)
    assert all(0 < result["relevance_score"] < 1 for result in results)
    answer = client.post("/v1/rerank", json=body | {"return_documents": "yes"})
    assert answer.status_code == 422 and "return_documents" in answer.json()["message"]


@pytest.mark.parametrize("form", ["documents", "texts"])
def test_null_is_absent(client, form):
    other = {"documents": "texts", "texts": "documents"}[form]
    nothing = dict.fromkeys(
        (other, "top_n", "raw_scores", "return_documents", "return_text", "truncate", "truncation_direction"),
    ) | dict.fromkeys(("cutoff_layers", "cascade", "truncate_prompt_tokens", "max_tokens_per_doc", "rank_fields"))
    plain = client.post("/rerank", json={"query": QUERY, form: TEXTS}).json()
    found = client.post("/rerank", json={"query": QUERY, form: TEXTS} | nothing).json()
    assert found == plain if form == "texts" else found["results"] == plain["results"]


def test_unknown_fields_are_ignored_and_logged_once(reranker, caplog):
    body = {"query": QUERY, "texts": TEXTS, "wishes": "rank well", "user": None}
    with client_of(reranker) as client, caplog.at_level(logging.WARNING):
        assert [client.post("/rerank", json=body).status_code for _ in range(3)] == [200] * 3
        assert client.post("/rerank", json=body | {f"f{n}": n for n in range(200)}).status_code == 422
    assert sum("wishes" in record.getMessage() for record in caplog.records) == 1
    assert "user" not in caplog.text


def test_two_lists_of_texts_are_refused(client):
    answer = client.post("/rerank", json={"query": QUERY, "texts": TEXTS, "documents": TEXTS})
    assert answer.status_code == 422 and "documents" in answer.json()["message"]


def test_top_n_in_teis_form(client):
    body = {"query": QUERY, "texts": TEXTS}
    everything = client.post("/rerank", json=body).json()
    assert client.post("/rerank", json=body | {"top_n": 2}).json() == everything[:2]


def test_raw_scores_in_every_form(client, reranker):
    expected = [(hit["corpus_id"], pytest.approx(hit["score"], abs=1e-5)) for hit in reranker.rank(QUERY, TEXTS)]
    for raw in ({"raw_scores": True}, {"use_activation": False}):
        body = {"query": QUERY, "documents": TEXTS} | raw
        assert order(client.post("/rerank", json=body).json()["results"], "relevance_score") == expected
        scores = client.post("/score", json={"text_1": QUERY, "text_2": TEXTS} | raw).json()["data"]
        assert sorted(order(scores)) == sorted(expected)


def test_rank_fields_are_joined_in_their_order(client, reranker):
    documents = [{"title": "lift", "body": "air", "text": "no"}, {"title": "heat", "body": "wing", "text": "no"}]
    body = {"query": QUERY, "documents": documents, "rank_fields": ["title", "body"], "raw_scores": True}
    found = client.post("/v1/rerank", json=body).json()["results"]
    ranked = reranker.rank(QUERY, ["lift\nair", "heat\nwing"])
    assert order(found, "relevance_score") == [
        (hit["corpus_id"], pytest.approx(hit["score"], abs=1e-5)) for hit in ranked
    ]


@pytest.mark.parametrize(
    ("documents", "fields"),
    [(["a string"], ["title"]), ([{"text": "t"}], ["title"]), ([{"title": 3}], ["title"]), ([{"text": "t"}], [])],
)
def test_rank_fields_that_are_not_there_are_refused(client, documents, fields):
    answer = client.post("/v1/rerank", json={"query": QUERY, "documents": documents, "rank_fields": fields})
    assert answer.status_code == 422, answer.text


def test_max_tokens_per_doc_keeps_the_beginning(client, reranker, computed):
    body = {"query": QUERY, "documents": TEXTS, "max_tokens_per_doc": 4, "max_tokens_per_query": 2}
    assert client.post("/v2/rerank", json=body).status_code == 200
    ((query, documents),) = computed
    for part, whole, tokens in [
        (query, QUERY, 2),
        *((part, whole, 4) for part, whole in zip(documents, TEXTS, strict=True)),
    ]:
        assert part and whole.startswith(part) and part != whole
        assert len(reranker.tokenizer(part, add_special_tokens=False)["input_ids"]) <= tokens


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncate_prompt_tokens_is_of_the_whole_prompt(client, reranker, computed, side):
    short = tokens_of(reranker, QUERY, "air")
    texts, limit = ["air", TEXTS[2]], short + 3
    body = {"query": QUERY, "documents": texts, "truncate_prompt_tokens": limit, "truncation_side": side}
    assert client.post("/rerank", json=body).status_code == 200
    ((_, (first, second)),) = computed
    assert first == "air" and second
    assert TEXTS[2].endswith(second) if side == "left" else TEXTS[2].startswith(second)
    assert limit - 2 <= tokens_of(reranker, QUERY, second) <= limit
    answer = client.post("/rerank", json=body | {"truncate_prompt_tokens": 3})
    assert answer.status_code == 422 and "truncate_prompt_tokens=3 leaves no room" in answer.json()["message"]
    whole = client.post("/rerank", json=body | {"truncate_prompt_tokens": -1, "truncation_side": None})
    plain = client.post("/rerank", json={"query": QUERY, "documents": texts})
    assert whole.json()["results"] == plain.json()["results"]


def test_truncation_direction_left_keeps_the_end(client, reranker, computed):
    long = " ".join(f"wing {number}" for number in range(100))
    body = {"query": QUERY, "texts": ["air", long], "truncation_direction": "Left", "truncate": True}
    assert client.post("/rerank", json=body).status_code == 200
    ((_, (first, kept)),) = computed
    assert first == "air" and long.endswith(kept)
    _, (cut, whole) = reranker.count_tokens(QUERY, [long, kept])
    assert cut - 2 <= whole <= cut


def test_voyage_refuses_to_cut_in_its_own_words(client):
    body = {"query": QUERY, "documents": ["wing " * 100], "truncation": False}
    assert client.post("/v1/rerank", json=body).status_code == 422
    assert client.post("/v1/rerank", json=body | {"truncation": True}).status_code == 200


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"max_chunks_per_doc": 2}, {"max_chunks_per_doc": 2}),
        ({"overlap_tokens": 4}, {"overlap": 4}),
        ({"overlap": 4, "max_chunks_per_doc": 3, "cascade": {"3": 0.5}}, {"overlap": 4, "max_chunks_per_doc": 3}),
    ],
)
def test_long_documents_are_read_in_chunks(client, reranker, asked, options):
    documents = [*TEXTS, " ".join(f"wing {number}" for number in range(100))]
    body = {"query": QUERY, "documents": documents, "raw_scores": True, "return_documents": True} | asked
    cascade = {3: 0.5} if "cascade" in asked else None
    expected = reranker.rank(QUERY, documents, chunk=True, cascade=cascade, **options)
    for more, name in (({}, "results"), ({"top_k": 3}, "data")):
        found = client.post("/v1/rerank", json=body | more).json()[name]
        assert order(found, "relevance_score") == [
            (hit["corpus_id"], pytest.approx(hit["score"], abs=1e-5)) for hit in expected[: len(found)]
        ]
        for result, hit in zip(found, expected, strict=False):
            assert result["chunk"] == hit["chunk"]
            assert result.get("is_truncated", False) == hit.get("is_truncated", False)
    assert any(hit["chunk"]["start"] for hit in expected)


def test_chunks_are_limited_and_not_cut_otherwise(reranker):
    body = {"query": QUERY, "documents": ["wing " * 500], "overlap": 0}
    with client_of(reranker, limits=Limits(documents=5)) as client:
        answer = client.post("/rerank", json=body)
        assert answer.status_code == 422 and "chunks are more than 5" in answer.json()["message"]
        (result,) = client.post("/rerank", json=body | {"max_chunks_per_doc": 5}).json()["results"]
        assert result["is_truncated"]
        for other in ({"truncate": False}, {"truncation_side": "left"}, {"truncate_prompt_tokens": 40}):
            answer = client.post("/rerank", json=body | other)
            assert answer.status_code == 422 and "max_chunks_per_doc and overlap" in answer.json()["message"]
        for wrong in ({"max_chunks_per_doc": 0}, {"overlap": -1}, {"overlap": 60}):
            assert client.post("/rerank", json=body | wrong).status_code == 422


@pytest.mark.parametrize("form", ["documents", "texts"])
def test_what_was_cut_says_so(client, form):
    answer = client.post("/rerank", json={"query": QUERY, form: ["air", "wing " * 100]}).json()
    results = answer["results"] if form == "documents" else answer
    assert {result["index"]: result.get("is_truncated") for result in results} == {0: None, 1: True}
    scores = client.post("/score", json={"text_1": QUERY, "text_2": ["air", "wing " * 100]}).json()["data"]
    assert [score.get("is_truncated") for score in scores] == [None, True]


@pytest.mark.parametrize(
    ("asked", "cut"),
    [
        ({"max_tokens_per_doc": 4}, [None, True]),
        ({"max_tokens_per_doc": 4, "truncation_side": "left"}, [None, True]),
        ({"max_tokens_per_doc": 4, "overlap": 0}, [None, True]),
        ({"max_tokens_per_query": 2}, [True, True]),
        ({"max_tokens_per_query": 2, "max_chunks_per_doc": 3}, [True, True]),
        ({"truncate_prompt_tokens": 30}, [None, True]),
        ({"truncate_prompt_tokens": 60, "max_tokens_per_doc": 40}, [None, None]),
    ],
)
@pytest.mark.parametrize("text", ["wing " * 9, "wing\ud83d\ude00 " * 6])
def test_what_a_request_itself_cuts_says_so(client, asked, cut, text):
    body = {"query": QUERY, "documents": ["air", text]} | asked
    answer = client.post("/rerank", content=json.dumps(body))
    assert answer.status_code == 200, answer.text
    results = sorted(answer.json()["results"], key=lambda result: result["index"])
    assert [result.get("is_truncated") for result in results] == cut


@pytest.mark.parametrize(
    "asked", [{"max_tokens_per_doc": 4}, {"truncate_prompt_tokens": 40}, {"truncation_side": "left"}]
)
def test_a_very_long_document_is_tokenised_no_further_than_it_is_read(client, tokenized_texts, monkeypatch, asked):
    offsets = TextEncoder.offsets
    monkeypatch.setattr(TextEncoder, "offsets", lambda self, text: tokenized_texts.append(text) or offsets(self, text))
    long = " ".join(f"wing {number}" for number in range(50_000))
    answer = client.post("/rerank", json={"query": QUERY, "texts": ["air", long]} | asked)
    assert answer.status_code == 200
    assert sum(map(len, tokenized_texts)) < len(long) / 10


def test_voyages_answer(client):
    cohere = client.post("/v1/rerank", json={"query": QUERY, "documents": TEXTS}).json()
    body = {"query": QUERY, "documents": TEXTS, "top_k": 2, "return_documents": True}
    answer = client.post("/v1/rerank", json=body).json()
    assert answer["object"] == "list" and answer["usage"] == cohere["usage"]
    assert order(answer["data"], "relevance_score") == order(cohere["results"], "relevance_score")[:2]
    assert [hit["document"] for hit in answer["data"]] == [TEXTS[hit["index"]] for hit in answer["data"]]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_the_scores_of_vllm(client, reranker, path):
    one = client.post(path, json={"text_1": QUERY, "text_2": TEXTS}).json()
    ranked = client.post("/rerank", json={"query": QUERY, "texts": TEXTS}).json()
    assert order(one["data"]) == sorted(order(ranked))
    assert one["object"] == "list" and {hit["object"] for hit in one["data"]} == {"score"}
    queries = [QUERY, "heat", QUERY]
    many = client.post(path, json={"queries": queries, "documents": TEXTS, "raw_scores": True}).json()
    expected = reranker.compute_score(list(zip(queries, TEXTS, strict=True)))
    assert [hit["score"] for hit in many["data"]] == pytest.approx(expected, abs=1e-5)
    assert len(client.post(path, json={"text_1": "a", "text_2": "b"}).json()["data"]) == 1
    for wrong in ({"text_1": ["a", "b"], "text_2": ["c"]}, {"text_1": "a", "text_2": []}, {"text_1": "a"}):
        assert client.post(path, json=wrong).status_code == 422


def test_who_the_server_is(client, reranker):
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/tiny").json()["model_type"] == "rerank"
    assert client.get("/v1/models/other").status_code == 404
    info = client.get("/info").json()
    assert (info["model_id"], info["max_input_length"], info["exits"]) == ("tiny", 64, [2, 3, 4, 5, 6])
    for path in ("/live", "/ready", "/health"):
        assert (client.get(path).status_code, client.head(path).content) == (200, b"")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"query": QUERY, "documents": TEXTS}),
        ("/rerank", {"query": QUERY, "texts": TEXTS}),
        ("/rerank", {"queries": [{"query": QUERY, "documents": TEXTS}]}),
        ("/score", {"text_1": QUERY, "text_2": TEXTS}),
    ],
)
def test_all_requests_have_the_same_priority(client, path, body):
    """So that no client passes others; a priority is refused rather than ignored."""
    for priority in (0, None):
        assert client.post(path, json=body | {"priority": priority}).status_code == 200
    for priority in (1, -1, 0.5, "0"):
        answer = client.post(path, json=body | {"priority": priority})
        assert answer.status_code == 422 and "body.priority: Input should be 0" in answer.json()["message"], priority
