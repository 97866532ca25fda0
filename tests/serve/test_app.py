"""The server as its clients see it."""

import json
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flagembedding_matryoshka.inference.fingerprint import model_fingerprint
from flagembedding_matryoshka.serve import Limits, create_app
from flagembedding_matryoshka.serve.forms import RERANK, SCORE, cohere, parse
from tests.serve.conftest import client_of, serving, wait_for

pytestmark = pytest.mark.usefixtures("one_thread")
QUERY = "how does a wing lift"
DOCUMENTS = ["the flow of energy", "air flows faster over the upper side of a wing.", "", "what is a heat flux? " * 9]
OPTIONS = [
    {},
    {"cutoff_layers": 3},
    {"cutoff_layers": [4], "compress_layers": [2], "compress_ratio": 2},
    {"compress_layers": 3, "compress_ratio": 8},
]


def expected(reranker, documents=DOCUMENTS, **options):
    """(index, relevance) the best first, by the re-ranker itself."""
    return [
        (hit["corpus_id"], pytest.approx(hit["score"], abs=1e-6))
        for hit in reranker.rank(QUERY, documents, normalize=True, **options)
    ]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_scores_are_the_rerankers(client, reranker, path, options):
    cohere = client.post(path, json={"query": QUERY, "documents": DOCUMENTS, "model": "any", **options})
    assert cohere.status_code == 200
    found = [(result["index"], result["relevance_score"]) for result in cohere.json()["results"]]
    assert found == expected(reranker, **options)
    tei = client.post(path, json={"query": QUERY, "texts": DOCUMENTS, **options}).json()
    assert [(result["index"], result["score"]) for result in tei] == found


def test_the_form_of_cohere_and_jina(client, reranker):
    documents = ["air", {"text": "wing", "title": "lift"}]
    body = {"model": "m", "query": QUERY, "documents": documents, "top_n": 2, "return_documents": True}
    answer = client.post("/v1/rerank", json=body).json()
    shared, tokens = reranker.count_tokens(QUERY, ["air", "wing"])
    total = shared + sum(tokens)
    assert set(answer) == {"id", "model", "results", "meta", "usage"}
    assert answer["model"] == "tiny"
    assert answer["meta"] == {"api_version": {"version": "2"}, "tokens": {"input_tokens": total, "output_tokens": 0}}
    assert answer["usage"] == {"prompt_tokens": total, "total_tokens": total}
    by_index = {result["index"]: result for result in answer["results"]}
    assert by_index[0]["document"] == {"text": "air"} and by_index[1]["document"] == documents[1]
    assert all(0 < result["relevance_score"] < 1 for result in answer["results"])
    body |= {"top_n": 1, "return_documents": False}
    (best,) = client.post("/v2/rerank", json=body).json()["results"]
    assert best == {key: value for key, value in answer["results"][0].items() if key != "document"}


def test_the_form_of_tei(client, reranker):
    body = {
        "query": QUERY,
        "texts": DOCUMENTS,
        "raw_scores": True,
        "return_text": True,
        "truncation_direction": "Right",
    }
    assert client.post("/rerank", json=body).json() == [
        {"index": hit["corpus_id"], "score": pytest.approx(hit["score"], abs=1e-5), "text": hit["text"]}
        | ({"is_truncated": True} if "is_truncated" in hit else {})
        for hit in reranker.rank(QUERY, DOCUMENTS, return_documents=True)
    ]


def test_tei_refuses_texts_that_do_not_fit_if_asked_to(client):
    body = {"query": QUERY, "texts": ["air", "wing"], "truncate": False}
    assert client.post("/rerank", json=body).status_code == 200
    body["texts"].append("wing " * 100)
    answer = client.post("/rerank", json=body)
    assert answer.status_code == 422
    assert "document 2 and the query do not fit into 64 tokens" in answer.json()["error"]
    assert client.post("/rerank", json=body | {"truncate": True}).status_code == 200


@pytest.mark.parametrize("length", ["max_tokens_per_doc", "max_tokens_per_query", "truncate_prompt_tokens"])
def test_a_request_that_wants_nothing_cut_is_not_cut_to_its_own_length(client, length):
    body = {"query": QUERY, "texts": ["air", "wing " * 8], "truncate": False}
    limit = 2 if length != "truncate_prompt_tokens" else 32
    answer = client.post("/rerank", json=body | {length: limit})
    assert answer.status_code == 422 and f"{length}={limit}" in answer.json()["error"]
    assert client.post("/rerank", json=body | {length: 60}).status_code == 200


@pytest.mark.parametrize("options", [{}, {"cascade": {"2": 0.5}}])
def test_texts_are_tokenised_once_from_the_request_to_its_answer(client, tokenized_texts, options):
    texts = [f"text {number} about a wing" for number in range(5)]
    answer = client.post("/rerank", json={"query": QUERY, "texts": texts, **options})
    assert answer.status_code == 200 and len(answer.json()) == 5
    assert len(tokenized_texts) == 1 + 5


def test_a_cascade_says_where_scores_were_read(client, reranker):
    documents = DOCUMENTS * 3
    cascade = {3: 0.5, 5: 0.25}
    ranked = reranker.rank(QUERY, documents, cascade=cascade, compress_layers=[2], compress_ratio=2)
    body = {"query": QUERY, "cascade": cascade, "compress_layers": [2], "compress_ratio": 2}
    results = client.post("/rerank", json=body | {"documents": documents}).json()["results"]
    for key in ("cutoff_layer", "index"):
        assert [result[key] for result in results] == [hit["corpus_id" if key == "index" else key] for hit in ranked]
    texts = client.post("/rerank", json=body | {"texts": documents, "raw_scores": True}).json()
    assert texts == [
        {
            "index": hit["corpus_id"],
            "score": pytest.approx(hit["score"], abs=1e-5),
            "cutoff_layer": hit["cutoff_layer"],
        }
        | ({"is_truncated": True} if "is_truncated" in hit else {})
        for hit in ranked
    ]


def test_no_documents_are_ranked_at_once(client):
    assert client.post("/rerank", json={"query": "q", "documents": []}).json()["results"] == []
    assert client.post("/rerank", json={"query": "q", "texts": []}).json() == []


def test_concurrent_requests_get_their_own_answers(client, reranker, gate):
    """Different documents, depths and widths, and bad ones in between, which arrive while the model computes."""
    bodies = [
        {
            "query": QUERY,
            "documents": [f"wing {number} " * (1 + number % 7) for number in range(count % 5 + 1)],
            **options,
        }
        for count, options in enumerate([*OPTIONS, {"cascade": {"3": 0.5}}] * 4)
    ]
    for place, bad in enumerate([{"cutoff_layers": 99}, {"cascade": {"9": 0.5}}, {"compress_ratio": 2}]):
        bodies.insert(4 * place, bodies[0] | bad)
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(client.post, "/rerank", json=body) for body in bodies]
        time.sleep(0.3)
        gate.set()
        answers = [answer.result() for answer in answers]
    assert [answer.status_code for answer in answers].count(422) == 3
    for body, answer in zip(bodies, answers, strict=True):
        options = {key: value for key, value in body.items() if key not in ("query", "documents")}
        if "cascade" in options:
            options["cascade"] = {int(layer): share for layer, share in options["cascade"].items()}
        if answer.status_code == 200:
            found = [(result["index"], result["relevance_score"]) for result in answer.json()["results"]]
            assert found == expected(reranker, body["documents"], **options)


def test_a_failing_request_among_good_ones(reranker, gate, monkeypatch):
    """What the model itself chokes on: nobody sees more of it than that it is internal."""
    gated = reranker.score_lists
    (poison,) = reranker.tokenize(("poison", "a text"))

    def choking(lists, **options):
        found = gated(lists, **options)
        if any(pair.lead == poison.lead for pairs in lists for pair in pairs):
            raise RuntimeError("a secret of the machine")
        return found

    monkeypatch.setattr(reranker, "score_lists", choking)
    with client_of(reranker) as client, ThreadPoolExecutor() as pool:
        bodies = [{"query": query, "texts": DOCUMENTS} for query in (QUERY, "poison", QUERY)]
        answers = [pool.submit(client.post, "/rerank", json=body) for body in bodies]
        time.sleep(0.2)
        gate.set()
        good, poisoned, also_good = [answer.result() for answer in answers]
        assert good.json() == also_good.json()
        assert [(result["index"], result["score"]) for result in good.json()] == expected(reranker)
        assert poisoned.status_code == 500
        assert poisoned.json() == dict.fromkeys(("message", "error", "detail"), "internal error")


def test_health_asks_a_model_that_failed(reranker, monkeypatch):
    with client_of(reranker) as client:
        assert client.get("/health").json() == {
            "status": "ok",
            "model": "tiny",
            "fingerprint": model_fingerprint(reranker),
        }
        with monkeypatch.context() as broken:
            broken.setattr(reranker, "score_lists", lambda *_, **__: 1 / 0)
            assert client.post("/rerank", json={"query": "q", "texts": ["t"]}).status_code == 500
            assert client.get("/health").status_code == 503
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": "q"}, "body.documents: Field required"),
        ({"texts": ["t"]}, "body.query: Field required"),
        ({"query": 3, "texts": ["t"]}, "body.query: Input should be a valid string"),
        ({"query": "q", "texts": "t"}, "body.texts: Input should be a valid array"),
        ({"query": "q", "texts": ["t", None]}, "body.texts.1: Input should be a valid string"),
        ({"query": "q", "documents": [{"title": "t"}]}, r"object with a string 'text', got the keys \['title'\]"),
        ({"query": "q", "documents": ["t"], "top_n": 0}, "body.top_n: Input should be greater than or equal to 1"),
        ({"query": "q", "documents": ["t"], "cutof_layers": 3}, "'cutof_layers' is unknown: do you mean 'cutoff"),
        ({"query": "q", "texts": ["t"], "truncation_direction": "Up"}, "body.truncation_direction: .*'right'"),
        ({"query": "q", "texts": ["t"], "cutoff_layers": True}, "body.cutoff_layers"),
        ({"query": "q", "texts": ["t"], "cutoff_layers": 7}, r"cutoff_layers \[7\] have no head.*\[2, 3, 4, 5, 6\]"),
        ({"query": "q", "texts": ["t"], "cutoff_layers": [2, 3]}, r"cutoff_layers=\[2, 3\]"),
        ({"query": "q", "texts": ["t"], "compress_ratio": 3}, "compress_ratio is 3, but must be one of"),
        ({"query": "q", "texts": ["t"], "cascade": {"6": 0.5}}, "cascade drops candidates after layer 6"),
        ({"query": "q", "texts": ["t"], "cascade": {"3": 1.5}}, r"cascade keeps 1.5 of all .* in \(0, 1\]"),
        (["q"], "body: Input should be an object"),
        ({"query": "q", "documents": [{"k" * 10_000: 1}]}, r"got the keys \['kkk.{1,200}$"),
        ({"query": "q", "texts": ["t"], "cutoff_layers": [*range(100_000)]}, r"^.{1,1000}$"),
    ],
)
def test_bad_requests_are_explained(client, body, message):
    answer = client.post("/rerank", json=body)
    assert answer.status_code == 422
    explanation = answer.json()
    assert set(explanation) == {"message", "error", "detail"} and len(set(explanation.values())) == 1
    assert re.search(message, explanation["message"]), explanation["message"]


@pytest.mark.parametrize("path", ["/rerank", "/score"])
@pytest.mark.parametrize("body", [b"null", b"3", b'"q"'])
def test_a_body_that_is_no_object_is_explained(client, path, body):
    answer = client.post(path, content=body)
    assert (answer.status_code, answer.json()["message"]) == (422, "body: Input should be an object")


def test_a_byte_order_mark_before_the_body_is_passed_over(client):
    body = json.dumps({"query": "q", "texts": ["t"]})
    answers = [client.post("/rerank", content=text.encode()) for text in (body, f"\ufeff{body}")]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()


def test_what_is_not_json_is_explained(client):
    answer = client.post("/rerank", content=b'{"query": ')
    assert answer.status_code == 422
    assert "Invalid JSON" in answer.json()["message"]
    assert client.get("/rerank").status_code == 405
    assert client.post("/embed").json()["message"] == "Not Found"


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_explained(client, number):
    for body in (
        f'{{"query": "q", "return_documents": true, "documents": [{{"text": "t", "price": {number}}}]}}',
        f'{{"query": "q", "texts": ["t"], "cascade": {{"3": {number}}}}}',
    ):
        answer = client.post("/rerank", content=body.encode())
        assert answer.status_code == 422 and answer.json()["message"]


def test_many_faults_cost_no_more_than_one(client):
    start = time.process_time()
    for name in ("documents", "texts"):
        answer = client.post("/rerank", json={"query": "q", name: [[]] * 500_000}, timeout=60)
        assert answer.status_code == 422 and len(answer.json()["message"]) < 500
    assert time.process_time() - start < 5


def test_a_body_is_read_as_it_is(client):
    answer = client.post("/rerank", content=b"x", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415 and "Content-Encoding 'gzip' is not supported" in answer.json()["message"]


def test_a_declared_length_is_refused_before_the_body_comes(reranker):
    with serving(create_app(reranker, "tiny", limits=Limits(body_bytes=200))) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 201\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_health_answers_a_head(client):
    answer = client.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("right", ["schlüssel", "clé-voilà", "ключ…"])
def test_a_key_may_be_of_any_letters(reranker, right):
    with client_of(reranker, api_key=right) as client:
        body = {"query": "q", "texts": ["t"]}
        for key, status in ((right, 200), ("schlussel", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert client.post("/rerank", json=body, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["text"] * 2, "rank_fields: Value error, a field is named twice"),
        ([f"f{number}" for number in range(33)], "rank_fields: List should have at most 32 items"),
    ],
)
def test_fields_to_rank_are_few_and_distinct(client, fields, message):
    document = dict.fromkeys(fields, "t")
    answer = client.post("/rerank", json={"query": "q", "documents": [document], "rank_fields": fields})
    assert answer.status_code == 422 and message in answer.json()["message"]
    answer = client.post("/rerank", json={"query": "q", "documents": [document], "rank_fields": fields[-1:] * 1})
    assert answer.status_code == 200


def test_texts_are_made_of_no_more_documents_than_are_allowed(monkeypatch):
    made, ranked_text = [], cohere._ranked_text

    def noting(number, *arguments):
        made.append(number)
        return ranked_text(number, *arguments)

    monkeypatch.setattr(cohere, "_ranked_text", noting)
    body = json.dumps({"query": "q", "documents": [{"text": "t"}] * 4}).encode()
    with pytest.raises(ValueError, match="4 documents are more than 3"):
        parse(body, RERANK, 3)
    assert not made
    assert len(parse(body, RERANK, 4).lists[0].documents) == len(made) == 4


@pytest.mark.parametrize("name", ["cutoff_layers", "compress_layers"])
def test_lists_of_layers_are_short(client, name):
    answer = client.post("/rerank", json={"query": "q", "texts": ["t"], name: [2] * 1001})
    assert answer.status_code == 422 and "at most 1000 items" in answer.json()["message"]


def test_no_more_chunks_are_made_than_are_allowed(reranker, monkeypatch):
    made, passage_offsets = [], reranker._pair_tokenizer.passage_offsets

    def noting(*arguments):
        made.append(arguments)
        return passage_offsets(*arguments)

    monkeypatch.setattr(reranker._pair_tokenizer, "passage_offsets", noting)
    with client_of(reranker, limits=Limits(documents=4)) as client:
        body = {"query": "q", "documents": ["wing and lift " * 2000], "overlap": 0}
        answer = client.post("/rerank", json=body)
        assert (answer.status_code, answer.json()["message"]) == (422, "5 chunks are more than 4")
        assert len(made) <= 6
        assert client.post("/rerank", json=body | {"max_chunks_per_doc": 3}).status_code == 200


def test_limits_of_documents_and_bytes(reranker):
    with client_of(reranker, limits=Limits(documents=2, body_bytes=200)) as client:
        assert client.post("/rerank", json={"query": "q", "texts": ["t"] * 2}).status_code == 200
        answer = client.post("/rerank", json={"query": "q", "texts": ["t"] * 3})
        assert (answer.status_code, answer.json()["message"]) == (422, "body: Value error, 3 documents are more than 2")
        large = json.dumps({"query": "q", "texts": ["t" * 200]}).encode()
        chunks = (large[start : start + 50] for start in range(0, len(large), 50))
        for content in (large, chunks):
            answer = client.post("/rerank", content=content)
            assert (answer.status_code, answer.json()["message"]) == (413, "the body is larger than 200 bytes")


def test_limit_of_requests(reranker, gate):
    with client_of(reranker, limits=Limits(requests=2)) as client, ThreadPoolExecutor() as pool:
        body = {"query": "q", "texts": ["t"]}
        admitted = [pool.submit(client.post, "/rerank", json=body) for _ in range(2)]
        assert gate.entered.wait(10)
        time.sleep(0.2)
        refused = client.post("/rerank", json=body)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        gate.set()
        assert [answer.result().status_code for answer in admitted] == [200, 200]
        assert client.post("/rerank", json=body).status_code == 200


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic key", "Bearer kéy", "key"])
def test_without_the_token_nothing_is_ranked(reranker, header):
    with client_of(reranker, api_key="key") as client:
        headers = {} if header is None else {"Authorization": header.encode()}
        answer = client.post("/rerank", json={"query": "q", "texts": ["t"]}, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer key"}
        assert client.post("/rerank", json={"query": "q", "texts": ["t"]}, headers=right).status_code == 200
        assert client.get("/health").status_code == 200


def held(client):
    return float(re.search(r"^matryoshka_request_bytes (\S+)$", client.get("/metrics").text, re.M)[1])


def test_memory_of_a_request_is_that_of_its_values():
    text = "a" * 100_000
    sizes = [
        parse(json.dumps({"query": "q", "texts": [other]}, ensure_ascii=False).encode(), RERANK, 9).held_bytes
        for other in (text, text + "\N{GRINNING FACE}")
    ]
    assert 100_000 < sizes[0] < 110_000 and 400_000 < sizes[1] < 410_000


@pytest.mark.parametrize(
    ("form", "body", "repeats"),
    [
        (RERANK, {"query": "q", "documents": ["TEXT"]}, False),
        (RERANK, {"query": "q", "documents": ["TEXT"], "return_documents": True}, True),
        (RERANK, {"query": "q", "documents": ["TEXT"], "top_k": 1, "return_documents": True}, True),
        (RERANK, {"query": "q", "texts": ["TEXT"]}, False),
        (RERANK, {"query": "q", "texts": ["TEXT"], "return_text": True}, True),
        (SCORE, {"text_1": "q", "text_2": ["TEXT"]}, False),
    ],
)
def test_texts_are_dropped_unless_the_answer_repeats_them(form, body, repeats):
    asked = parse(json.dumps(body).replace("TEXT", "t" * 10_000).encode(), form, 9)
    assert asked.held_bytes > 10_000
    asked.drop_texts()
    assert (asked.held_bytes > 10_000) == repeats


def test_memory_of_requests_has_a_limit(reranker, gate):
    """A text of one emoji and many letters has four times the bytes of its body."""
    limits = Limits(body_bytes=100_000, bytes=300_000)
    with client_of(reranker, limits=limits) as client, ThreadPoolExecutor() as pool:
        content = json.dumps({"query": "q", "texts": ["a" * 70_000 + "\N{GRINNING FACE}"]}, ensure_ascii=False).encode()
        first = pool.submit(client.post, "/rerank", content=content)
        assert gate.entered.wait(10)
        assert 0 < held(client) < 10_000, "tokens and no texts"
        repeated = json.loads(content) | {"return_text": True}
        second = pool.submit(client.post, "/rerank", json=repeated)
        wait_for(client, "matryoshka_queue_requests 2.0")
        while held(client) < 280_000:
            time.sleep(0.01)
        refused = client.post("/rerank", json=repeated)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert "too many large requests" in refused.json()["message"]
        gate.set()
        assert [answer.result().status_code for answer in (first, second)] == [200, 200]
        assert held(client) == 0
        assert client.post("/rerank", json=repeated).status_code == 200


def test_the_limit_and_the_queue_count_requests_and_not_queries(reranker, gate):
    with client_of(reranker, limits=Limits(requests=2, degrade_to=3)) as client, ThreadPoolExecutor() as pool:
        pairs = {"text_1": [f"query {number}" for number in range(20)], "text_2": ["t"] * 20}
        many = pool.submit(client.post, "/score", json=pairs)
        assert gate.entered.wait(10)
        wait_for(client, "matryoshka_queue_requests 1.0")
        other = pool.submit(client.post, "/rerank", json={"query": "q", "texts": ["t"]})
        wait_for(client, "matryoshka_queue_requests 2.0")
        assert client.post("/rerank", json={"query": "q", "texts": ["t"]}).status_code == 429
        gate.set()
        assert len(many.result().json()["data"]) == 20
        assert "cutoff_layer" not in other.result().json()[0]


def test_who_hangs_up_is_not_computed(reranker, gate):
    with client_of(reranker) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/rerank", json={"query": "q", "texts": ["first"]})
        assert gate.entered.wait(10)
        body = json.dumps({"query": "q", "texts": ["gone"]})
        with socket.create_connection((client.base_url.host, client.base_url.port)) as gone:
            gone.sendall(f"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(client, "matryoshka_queue_requests 2.0")
        wait_for(client, 'matryoshka_requests_total{path="/rerank",status="499"} 1.0')
        gate.set()
        assert first.result().status_code == 200
        assert client.post("/rerank", json={"query": "q", "texts": ["last"]}).status_code == 200
        metrics = client.get("/metrics").text
        assert "matryoshka_queue_requests 0.0" in metrics
        assert "matryoshka_batch_documents_sum 2.0" in metrics


def test_who_hangs_up_while_sending_is_no_error_of_the_server(reranker):
    with client_of(reranker) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as gone:
            gone.sendall(b"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.1)
        wait_for(client, 'matryoshka_requests_total{path="/rerank",status="499"} 1.0')


def test_metrics_count_requests_batches_and_tokens(reranker, gate):
    with client_of(reranker) as client, ThreadPoolExecutor() as pool:
        body = {"query": QUERY, "texts": ["a", "b"]}
        first = pool.submit(client.post, "/rerank", json=body)
        assert gate.entered.wait(10)
        others = [pool.submit(client.post, "/rerank", json=body) for _ in range(3)]
        wait_for(client, "matryoshka_queue_requests 4.0")
        gate.set()
        assert all(answer.result().status_code == 200 for answer in [first, *others])
        client.post("/rerank", json={})
        shared, tokens = reranker.count_tokens(QUERY, ["a", "b"])
        metrics = client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=")
        for line in (
            'matryoshka_requests_total{path="/rerank",status="200"} 4.0',
            'matryoshka_requests_total{path="/rerank",status="422"} 1.0',
            'matryoshka_request_seconds_count{path="/rerank",status="2xx"} 4.0',
            'matryoshka_request_seconds_count{path="/rerank",status="4xx"} 1.0',
            "matryoshka_queue_seconds_count 4.0",
            "matryoshka_batch_seconds_count 2.0",
            "matryoshka_batch_requests_sum 4.0",
            "matryoshka_batch_documents_sum 8.0",
            f"matryoshka_tokens_total {4.0 * (shared + sum(tokens))}",
        ):
            assert line in metrics.text, line


@pytest.mark.skipif(sys.platform != "linux", reason="prometheus_client reads /proc")
def test_metrics_have_the_memory_of_the_process(client):
    metrics = client.get("/metrics").text
    assert float(re.search(r"^process_resident_memory_bytes (\S+)$", metrics, re.M)[1]) > 2**20
