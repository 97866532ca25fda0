"""What callers hand in: any container with an order, and nothing else."""

import numpy as np
import pandas as pd
import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.inputs import as_lists, as_pairs

PAIRS = [("how does a wing lift", "air flows faster"), ("heat", "a flux of energy")]
QUERY, DOCUMENTS = "wing", ["air flows", "a wing lifts", "heat"]


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", max_length=64)


@pytest.mark.parametrize(
    "pairs",
    [
        iter(PAIRS),
        (list(pair) for pair in PAIRS),
        np.array(PAIRS),
        zip(["how does a wing lift", "heat"], ["air flows faster", "a flux of energy"], strict=True),
        pd.Series(PAIRS),
        pd.DataFrame(PAIRS).itertuples(index=False),
    ],
)
def test_pairs_come_in_any_container_with_an_order(pairs):
    assert as_pairs(pairs) == PAIRS


def test_a_single_pair_may_be_an_array():
    assert as_pairs(np.array(PAIRS[0])) == as_pairs(list(PAIRS[0])) == PAIRS[:1]


@pytest.mark.parametrize(
    ("pairs", "kind"),
    [
        (dict(PAIRS), "dict"),
        (set(PAIRS), "set"),
        (dict(PAIRS).items(), "dict_items"),
        (pd.DataFrame(PAIRS, columns=["query", "passage"]), "DataFrame"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_what_has_no_order_or_lists_names_is_refused(pairs, kind):
    with pytest.raises(TypeError, match=f"pairs of query and passage must be a list, got the {kind}"):
        as_pairs(pairs)


@pytest.mark.parametrize("row", [{"query": "a", "passage": "b"}, {"a", "b"}, pd.DataFrame({"a": [1], "b": [2]})])
def test_a_row_that_is_no_pair_is_refused(row):
    with pytest.raises(TypeError, match="pair 1 must be a query and a passage, got"):
        as_pairs([PAIRS[0], row])


@pytest.mark.parametrize("container", [iter, tuple, np.array, pd.Series, lambda items: (item for item in items)])
def test_documents_rank_in_any_container(reranker, container):
    expected = reranker.rank(QUERY, DOCUMENTS, return_documents=True)
    assert len(expected) == 3
    assert reranker.rank(QUERY, container(DOCUMENTS), return_documents=True) == expected
    (found,) = reranker.rank_batch(iter([QUERY]), iter([container(DOCUMENTS)]), return_documents=True)
    assert found == expected
    cascade = {"cascade": {3: 0.5}}
    assert reranker.rank(QUERY, container(DOCUMENTS), **cascade) == reranker.rank(QUERY, DOCUMENTS, **cascade)


@pytest.mark.parametrize(
    ("queries", "candidates", "error", "message"),
    [
        ("wing", [DOCUMENTS], TypeError, "queries must be a list, got the string 'wing'"),
        ([QUERY], {QUERY: DOCUMENTS}, TypeError, "candidates must be a list, got the dict"),
        ([QUERY], [DOCUMENTS, DOCUMENTS], ValueError, "2 lists of candidates need a list of as many queries, got 1"),
        ([QUERY, 3], [[], []], TypeError, "query 1 must be a string, got 3"),
        ([QUERY], [dict.fromkeys(DOCUMENTS)], TypeError, "documents of query 0 must be a list, got the dict"),
        ([QUERY], [pd.DataFrame({"text": DOCUMENTS})], TypeError, "query 0 must be a list, got the DataFrame"),
        ([QUERY], [["a", None]], TypeError, "document 1 of query 0 must be a string, got None"),
    ],
)
def test_lists_that_are_none_are_named(queries, candidates, error, message):
    with pytest.raises(error, match=message):
        as_lists(queries, candidates)


def test_integers_of_numpy_are_integers(reranker):
    options = {"compress_layers": np.array([2, 3]), "compress_ratio": np.int64(2)}
    found = reranker.compute_score(PAIRS, cutoff_layers=np.int64(4), **options)
    assert found == reranker.compute_score(PAIRS, cutoff_layers=4, compress_layers=[2, 3], compress_ratio=2)
    assert reranker.rank(QUERY, DOCUMENTS, top_k=np.int32(2)) == reranker.rank(QUERY, DOCUMENTS, top_k=2)


def test_half_a_surrogate_pair_is_a_replaced_character(reranker):
    whole, halves, broken = "a \U0001f600 wing", "a \ud83d\ude00 wing", "a \ud83d wing"
    scores = reranker.compute_score([(QUERY, text) for text in (whole, halves, broken, "a \ufffd wing")])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) and scores[2] == pytest.approx(scores[3], abs=1e-6)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"batch_size": float("nan")}, TypeError, "batch_size must be an int, got nan"),
        ({"max_tokens_per_batch": 2.5}, TypeError, "max_tokens_per_batch must be an int, got 2.5"),
        ({"max_length": "64"}, TypeError, "max_length must be an int, got '64'"),
        ({"query_max_length": True}, TypeError, "query_max_length must be an int, got True"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int, or None for all documents, got 1.5"),
        ({"top_k": -1}, ValueError, "top_k is -1, but must be at least 1, or None for all documents"),
        ({"normalize": 3}, ValueError, "normalize is 3, but must be True, False or 'calibrated'"),
        ({"cutoff_layers": {3: 0.5}}, TypeError, "cutoff_layers must be an int or a list of ints, got the dict"),
        ({"cascade": 3}, TypeError, "cascade must be {exit: share}, got 3"),
        ({"cascade": {3: "0.5"}}, TypeError, "the shares of a cascade must be numbers, got '0.5'"),
        ({"cascade": {"3": 0.5}}, TypeError, "the exits of a cascade must be an int"),
        ({"cascade": [(3, 0.5), (3, 0.4)]}, ValueError, "cascade names an exit twice"),
    ],
)
def test_a_value_of_another_kind_is_named(reranker, given, error, message):
    with pytest.raises(error, match=message):
        reranker.rank(QUERY, DOCUMENTS, **given)


@pytest.mark.parametrize("depths", [[3], [3, 5], [3.5, 4]])
def test_depths_that_are_none_of_the_exits_are_refused(reranker, depths):
    with pytest.raises((TypeError, ValueError), match="depths must be"):
        reranker.estimate_flops(PAIRS, depths, cutoff_layers=[3, 4])


def test_lists_of_tokenised_pairs_are_lists(reranker):
    with pytest.raises(TypeError, match="lists must be a list, got the int 3"):
        reranker.score_lists(3)


def test_half_a_surrogate_pair_in_a_prompt_is_a_replaced_character(reranker):
    scores = [reranker.compute_score(PAIRS, prompt=prompt) for prompt in ("a \ud83d?", "a \ufffd?")]
    assert scores[0] == scores[1]
