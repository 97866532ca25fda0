import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation.candidates import from_bm25
from flagembedding_matryoshka.text.collections import read_collection

JUDGEMENTS = [("q1", "p2", 1), ("q1", "p5", 2), ("q3", "p6", 1), ("q2", "p1", 1)]


@pytest.fixture
def beir(collection):
    """A directory with three judged queries. BM25 finds nothing for q2."""
    return collection(judgements=JUDGEMENTS, split="test")


@pytest.fixture
def candidates(beir):
    return from_bm25(read_collection(beir, "test"), top_k=6)


@pytest.fixture(scope="session")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=5)
