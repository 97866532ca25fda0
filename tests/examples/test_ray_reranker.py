import json
from importlib import import_module

import httpx
import pytest

from flagembedding_matryoshka import MatryoshkaReranker

PAIRS = [{"query": "wing", "passage": f"a wing {number}"} for number in range(40)]


@pytest.fixture(scope="module")
def example(ray_cluster):
    yield import_module("ray_reranker")
    ray_cluster.serve.shutdown()


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu")


@pytest.mark.slow
def test_a_batch_job_scores_every_pair(example, reranker, tiny_layerwise_path, tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    example.score(str(tiny_layerwise_path), str(source), str(tmp_path / "scored"), workers=2)
    rows = [json.loads(line) for path in (tmp_path / "scored").iterdir() for line in path.read_text().splitlines()]
    expected = reranker.compute_score([(row["query"], row["passage"]) for row in rows])
    assert sorted(row["passage"] for row in rows) == sorted(row["passage"] for row in PAIRS)
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_cluster_answers_the_servers_clients(example, reranker, tiny_layerwise_path, monkeypatch):
    cohere = pytest.importorskip("cohere")
    monkeypatch.setenv("MATRYOSHKA_API_KEY", "key")
    example.start(str(tiny_layerwise_path), workers=2)
    address, key = "http://127.0.0.1:8000", {"Authorization": "Bearer key"}
    documents = ["heat", "a wing", "the flow"]
    expected = reranker.rank("wing", documents, top_k=2, cascade={3: 0.7}, normalize=True)
    body = {"query": "wing", "documents": documents, "top_n": 2, "cascade": {"3": 0.7}}
    for _ in range(4):  # of both workers
        answer = httpx.post(f"{address}/rerank", json=body, headers=key, timeout=60)
        found = [(result["index"], result["relevance_score"]) for result in answer.json()["results"]]
        assert found == [(hit["corpus_id"], pytest.approx(hit["score"], abs=1e-5)) for hit in expected]
    answer = cohere.ClientV2("key", base_url=address).rerank(model="m", query="wing", documents=documents)
    assert [result.index for result in answer.results] == [hit["corpus_id"] for hit in reranker.rank("wing", documents)]
    refused = httpx.post(f"{address}/rerank", json=body | {"cutoff_layers": 99}, headers=key, timeout=60)
    assert refused.status_code == 422 and "99" in refused.json()["message"]
    assert httpx.post(f"{address}/rerank", json=body, timeout=60).status_code == 401
    assert httpx.get(f"{address}/ready", timeout=60).status_code == 200
    assert "matryoshka_queue_requests" in httpx.get(f"{address}/metrics", timeout=60).text
