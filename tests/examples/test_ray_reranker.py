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
def test_a_deployment_of_two_workers_ranks(example, reranker, tiny_layerwise_path):
    example.start(str(tiny_layerwise_path), workers=2)
    documents = ["heat", "a wing", "the flow"]
    request = {"query": "wing", "documents": documents, "top_k": 2, "cutoff_layers": 3}
    for _ in range(4):
        answer = httpx.post("http://127.0.0.1:8000/rerank", json=request, timeout=60)
        assert answer.status_code == 200
        expected = reranker.rank("wing", documents, top_k=2, cutoff_layers=3)
        assert [hit["corpus_id"] for hit in answer.json()] == [hit["corpus_id"] for hit in expected]
    refused = httpx.post("http://127.0.0.1:8000/rerank", json=request | {"cutoff_layers": 99}, timeout=60)
    assert refused.status_code == 422 and "99" in refused.json()["message"]
