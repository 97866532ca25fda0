"""Scores that are not computed again."""

import re
import tracemalloc

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.serve import Limits, create_app
from flagembedding_matryoshka.serve.cache import BYTES_OF_A_SCORE, ScoreCache, score_keys
from flagembedding_matryoshka.setting import Setting
from tests.serve.conftest import client_of

pytestmark = pytest.mark.usefixtures("one_thread")
QUERY = "how does a wing lift"
TEXTS = ["the flow of energy", "air flows faster over the upper side of a wing.", "what is a heat flux? " * 40]


@pytest.fixture(scope="module")
def invariant(tiny_layerwise_path):
    return MatryoshkaReranker(
        str(tiny_layerwise_path), dtype="bfloat16", devices="cpu", max_length=64, batch_invariant=True
    )


@pytest.fixture
def cached(invariant):
    """A client of a server with a cache."""
    with client_of(invariant, limits=Limits(cache_bytes=1_000_000)) as client:
        yield client


def numbers(client):
    """Pairs that were found, pairs that were not, and documents that were computed."""
    text = client.get("/metrics").text
    names = ('cache_pairs_total{result="found"}', 'cache_pairs_total{result="missed"}', "batch_documents_sum")
    return [int(float(re.search(rf"^matryoshka_{re.escape(name)} (\S+)$", text, re.M)[1])) for name in names]


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return {name: value for name, value in answer.json().items() if name not in ("id", "created")}


def test_a_pair_is_computed_once_for_all_forms(cached, invariant):
    first = post(cached, "/rerank", query=QUERY, documents=TEXTS, normalize=False, return_operations=True)
    assert numbers(cached) == [0, 3, 3]
    assert post(cached, "/rerank", query=QUERY, documents=TEXTS, normalize=False, return_operations=True) == first
    assert [result.get("is_truncated") for result in first["results"]].count(True) == 1
    assert numbers(cached) == [3, 3, 3]
    expected = invariant.compute_score([(QUERY, text) for text in TEXTS])
    pairs = post(cached, "/score", text_1=QUERY, text_2=[*TEXTS[1:], "another"], raw_scores=True)["data"]
    assert [pair["score"] for pair in pairs][:2] == expected[1:]
    assert numbers(cached) == [5, 4, 4]
    several = post(cached, "/rerank", queries=[{"query": QUERY, "documents": TEXTS}] * 2, normalize=False)
    assert several["rankings"] == [first["results"]] * 2
    assert numbers(cached) == [11, 4, 4]
    fused = post(cached, "/rerank", query=QUERY, documents=TEXTS, first_stage="order", fusion=1, normalize=False)
    assert {hit["index"]: hit["model_score"] for hit in fused["results"]} == dict(enumerate(expected))
    assert numbers(cached) == [14, 4, 4]


def test_scores_of_other_settings_and_texts_are_others(cached):
    asked = dict(query=QUERY, documents=TEXTS, normalize=False)
    settings = [{}, {"cutoff_layers": 4}, {"compress_layers": 2, "compress_ratio": 2}, {"max_tokens_per_doc": 3}]
    for others in settings * 2:
        post(cached, "/rerank", **asked | others)
    post(cached, "/rerank", **asked | {"query": f"{QUERY}?"})
    found, missed, computed = numbers(cached)
    # Of two texts each, only the first three tokens count with `max_tokens_per_doc`; a short text stays as it is.
    assert missed == computed and found == 27 - missed and 14 <= missed <= 15


def test_cascades_and_deadlines_are_computed_anew(cached):
    for options in ({"cascade": {"3": 0.5}}, {"deadline_ms": 3_600_000}) * 2:
        post(cached, "/rerank", query=QUERY, documents=TEXTS, **options)
    assert numbers(cached) == [0, 0, 12]


def test_keys_tell_query_passage_and_prompt_apart(invariant):
    pairs = invariant.tokenize([("a wing", "lifts"), ("a", "wing lifts"), ("a wing", "lift"), ("a wing", "lifts")])
    full = score_keys("model", Setting((6,)), pairs)
    assert full[0] == full[3] and len(set(full)) == 3
    assert not set(full) & {*score_keys("other", Setting((6,)), pairs), *score_keys("model", Setting((5,)), pairs)}


def test_the_score_asked_for_the_longest_time_ago_makes_room():
    cache = ScoreCache(2 * BYTES_OF_A_SCORE)
    cache.store([b"a", b"b"], [1.0, 2.0])
    assert cache.find([b"a"]) == [1.0]
    cache.store([b"c"], [3.0])
    assert cache.find([b"a", b"b", b"c"]) == [1.0, None, 3.0]
    assert (cache.held, cache.found, cache.missed) == (2 * BYTES_OF_A_SCORE, 3, 1)
    with pytest.raises(ValueError, match="cache_bytes is 319, but must be at least 320"):
        ScoreCache(319)


def test_a_full_cache_is_no_larger_than_its_limit():
    tracemalloc.start()
    try:
        cache = ScoreCache(3000 * BYTES_OF_A_SCORE)
        for number in range(9000):
            cache.store([number.to_bytes(32, "little")], [number / 7])
        assert tracemalloc.get_traced_memory()[0] <= cache.held == 3000 * BYTES_OF_A_SCORE
    finally:
        tracemalloc.stop()


def test_scores_that_depend_on_their_batch_are_not_kept(reranker):
    with pytest.raises(ValueError, match="cache_bytes is 1000, but scores depend on their batch: give batch_invariant"):
        create_app(reranker, "tiny", Limits(cache_bytes=1000))
