import pytest

from flagembedding_matryoshka import MatryoshkaReranker

QUERY = "how does a wing lift"
TEXTS = ["the flow of energy", "air flows faster over the upper side of a wing.", "what is a heat flux?", "lift"]
OPTIONS = [
    {},
    {"cutoff_layers": 3, "normalize": True},
    {"compress_layers": [2], "compress_ratio": 2, "cascade": {3: 0.5}},
]


@pytest.fixture(scope="session")
def reranker(tiny_layerwise_path):
    """Tests leave it as it is."""
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")


@pytest.fixture(scope="session")
def other_path(tiny_layerwise_path):
    """Arguments of a ranking that loads: a path, and what its constructor and its rankings take."""
    return {"reranker": str(tiny_layerwise_path), "device": "cpu", "dtype": "bfloat16", "cutoff_layers": 4}


def expected(reranker, top_k=None, **options):
    """(text, score) as the re-ranker itself ranks."""
    hits = reranker.rank(QUERY, TEXTS, top_k, return_documents=True, **options)
    return [(hit["text"], pytest.approx(hit["score"], abs=1e-5)) for hit in hits]
