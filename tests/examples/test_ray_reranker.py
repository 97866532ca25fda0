import json
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the example needs ray[data,serve]")
import httpx
import ray
import ray_reranker

from flagembedding_matryoshka import MatryoshkaReranker

PAIRS = [{"query": "wing", "passage": f"a wing {number}"} for number in range(40)]


@pytest.fixture(scope="module")
def cluster():
    """Two workers on this machine."""
    environment = {"env_vars": {"PYTHONPATH": str(Path(ray_reranker.__file__).parent)}}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu")


@pytest.mark.slow
def test_a_batch_job_scores_every_pair(cluster, reranker, tiny_layerwise_path, tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    ray_reranker.score(str(tiny_layerwise_path), str(source), str(tmp_path / "scored"), workers=2)
    rows = [json.loads(line) for path in (tmp_path / "scored").iterdir() for line in path.read_text().splitlines()]
    expected = reranker.compute_score([(row["query"], row["passage"]) for row in rows])
    assert sorted(row["passage"] for row in rows) == sorted(row["passage"] for row in PAIRS)
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_deployment_of_two_workers_ranks(cluster, reranker, tiny_layerwise_path):
    ray_reranker.start(str(tiny_layerwise_path), workers=2)
    documents = ["heat", "a wing", "the flow"]
    request = {"query": "wing", "documents": documents, "top_k": 2, "cutoff_layers": 3}
    for _ in range(4):
        answer = httpx.post("http://127.0.0.1:8000/rerank", json=request, timeout=60)
        assert answer.status_code == 200
        expected = reranker.rank("wing", documents, top_k=2, cutoff_layers=3)
        assert [hit["corpus_id"] for hit in answer.json()] == [hit["corpus_id"] for hit in expected]
    refused = httpx.post("http://127.0.0.1:8000/rerank", json=request | {"cutoff_layers": 99}, timeout=60)
    assert refused.status_code == 422 and "99" in refused.json()["message"]
