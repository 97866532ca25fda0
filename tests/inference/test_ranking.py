import queue
import threading
from itertools import islice

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference import scoring
from flagembedding_matryoshka.inference.chunking import Chunking

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["wing", "flow", "body", "heat", "shock", "plate", "speed", "layer"]
DOCUMENTS = [" ".join(WORDS[(7 * i + j) % 8] for j in range(1 + 3 * i % 11)) for i in range(20)]
QUERIES = [f"what about the {word}" for word in WORDS]
LISTS = [DOCUMENTS[start : start + size] for start, size in [(0, 20), (3, 0), (3, 9), (5, 1), (0, 7), (9, 9), (0, 0)]]
OPTIONS = [
    {},
    {"top_k": 3, "return_documents": True, "normalize": True},
    {"cascade": {2: 0.5, 4: 0.3}, "top_k": 1},
    {"cutoff_layers": 4, "compress_layers": [2], "compress_ratio": 2, "batch_size": 3},
]


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")


@pytest.fixture(params=[None, 4])
def pairs_of_a_window(request, monkeypatch):
    """None is as many as fit; 4 cut the longest lists, but not a cascade's."""
    if request.param:
        monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_AHEAD", request.param)


def lists():
    return zip(QUERIES[: len(LISTS)], (iter(documents) for documents in LISTS), strict=True)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("pairs_of_a_window")
def test_rankings_come_one_by_one_as_they_come_together(reranker, options):
    expected = reranker.rank_batch(QUERIES[: len(LISTS)], LISTS, **options)
    assert list(reranker.rank_iter(lists(), **options)) == expected
    assert list(reranker.rank_iter(iter(QUERIES[: len(LISTS)]), iter(LISTS), **options)) == expected
    assert [len(ranking) for ranking in expected] == [
        min(len(documents), options.get("top_k", 20)) for documents in LISTS
    ]


@pytest.mark.parametrize("options", OPTIONS)
def test_windows_change_no_ranking(reranker, options, monkeypatch):
    expected = reranker.rank_batch(QUERIES[: len(LISTS)], LISTS, **options)
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_AHEAD", 4)
    for ours, theirs in zip(reranker.rank_iter(lists(), **options), expected, strict=True):
        assert [hit["corpus_id"] for hit in ours] == [hit["corpus_id"] for hit in theirs]
        assert [hit["score"] for hit in ours] == pytest.approx([hit["score"] for hit in theirs], abs=1e-5)


@pytest.mark.parametrize("cascade", [None, {2: 0.5}])
def test_an_endless_input_is_read_a_window_ahead(reranker, cascade, monkeypatch):
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_AHEAD", 10)
    read = []

    def endless():
        while True:
            read.append(1)
            yield QUERIES[len(read) % 8], DOCUMENTS[:3]

    rankings = reranker.rank_iter(endless(), cascade=cascade)
    assert not read
    for number, ranking in enumerate(islice(rankings, 30), start=1):
        assert len(ranking) == 3
        assert len(read) <= number + 3 * 4
    # Between two rankings nothing is left undone that another call would wait for.
    assert reranker.rank(QUERIES[0], DOCUMENTS[:2]) and len(next(rankings)) == 3
    rankings.close()


@pytest.mark.parametrize("options", [{}, {"cascade": {2: 0.5}}, {"chunk": True}])
def test_the_next_query_may_depend_on_the_last_ranking(reranker, options):
    asked = queue.SimpleQueue()
    asked.put(QUERIES[0])
    rows = iter(lambda: (asked.get(timeout=60), DOCUMENTS[:3]), None)
    rankings = reranker.rank_iter(rows, **options)
    for number in range(1, 4):
        assert len(next(rankings)) == 3
        asked.put(QUERIES[number])
    rankings.close()


def test_the_input_is_read_in_a_thread_while_rankings_are_computed(reranker, monkeypatch):
    """The fourth list is there only when the first one is computed: a reader in the caller's thread would wait."""
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_FIRST", 3)
    is_computed, readers = threading.Event(), set()
    start = reranker._engine.start
    monkeypatch.setattr(reranker._engine, "start", lambda *given: is_computed.set() or start(*given))

    def rows():
        for number, query in enumerate(QUERIES[:6]):
            readers.add(threading.current_thread())
            assert number < 3 or is_computed.wait(60)
            yield query, DOCUMENTS[:3]

    assert len(list(reranker.rank_iter(rows()))) == 6
    assert threading.current_thread() not in readers


def test_chunks_are_tokenised_in_a_thread(reranker, monkeypatch):
    threads = []
    of_chunking = Chunking.cut
    monkeypatch.setattr(
        Chunking, "cut", lambda *arguments: threads.append(threading.current_thread()) or of_chunking(*arguments)
    )
    reranker.rank_batch(QUERIES[:2], [DOCUMENTS[:2]] * 2, chunk=True)
    assert len(threads) == 2 and threading.current_thread() not in threads


def test_few_pairs_start_no_thread(reranker, monkeypatch):
    monkeypatch.setattr(scoring, "ThreadPoolExecutor", lambda count: pytest.fail("a thread was started"))
    assert len(reranker.compute_score([("wing", "a")])) == 1
    assert len(reranker.rank("wing", ["a", "b"], cascade={2: 0.5})) == 2


def test_an_input_that_fails_is_an_error_and_a_closed_iterator_reads_no_more(reranker):
    def rows():
        yield QUERIES[0], DOCUMENTS[:3]
        raise OSError("no more of it")

    with pytest.raises(OSError, match="no more of it"):
        list(reranker.rank_iter(rows()))
    read = []
    rankings = reranker.rank_iter(read.append(1) or (query, DOCUMENTS[:1]) for query in QUERIES * 1000)
    next(rankings)
    rankings.close()
    count = len(read)
    assert len(reranker.rank(QUERIES[0], DOCUMENTS)) == len(DOCUMENTS)
    assert len(read) <= count + 1 < 8000


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a query",), TypeError, "lists must be a list, got the string 'a query'"),
        (({"a query": []},), TypeError, "lists must be a list, got the dict"),
        ((["wing"], {"wing": []}), TypeError, "candidates must be a list, got the dict"),
    ],
)
def test_what_cannot_be_read_at_all_is_refused_at_once(reranker, arguments, error, message):
    with pytest.raises(error, match=message):
        reranker.rank_iter(*arguments)
    for options, error in [({"top_k": 0}, ValueError), ({"cutoff_layers": 1}, ValueError), ({"depth": 3}, TypeError)]:
        with pytest.raises(error):
            reranker.rank_iter([], [], **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([("wing", ["a"]), "flow"],), TypeError, "list 1 must be a query and its documents, got 'flow'"),
        (([("wing", "flow")],), TypeError, "the documents of query 0 must be a list, got the string 'flow'"),
        (([("wing", ["a", 3])],), TypeError, "document 1 of query 0 must be a string, got 3"),
        (([(None, ["a"])],), TypeError, "query 0 must be a string, got None"),
        ((["wing", "flow"], [["a"]]), ValueError, "as many queries .* list of candidates 1 is missing"),
        ((["wing"], [["a"], ["b"]]), ValueError, "as many queries .* query 1 is missing"),
    ],
)
def test_what_is_wrong_in_a_list_is_named_when_it_is_read(reranker, arguments, error, message):
    rankings = reranker.rank_iter(*arguments)
    with pytest.raises(error, match=message):
        list(rankings)


def test_a_cascade_that_keeps_too_few_is_refused(reranker):
    with pytest.raises(ValueError, match="keeps 2 of the 20 candidates of query 1, fewer than top_k=5"):
        list(reranker.rank_iter([("wing", []), ("wing", DOCUMENTS)], top_k=5, cascade={2: 0.1}))


def test_texts_are_tokenised_once_in_a_call_and_not_again(reranker, tokenized_texts):
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    assert len(pairs) < scoring.PAIRS_TOKENIZED_FIRST
    different = len(set(QUERIES)) + len(set(DOCUMENTS))
    expected = reranker.compute_score(pairs, cutoff_layers=[2, 4, 6], compress_layers=[2], compress_ratio=2)
    assert len(tokenized_texts) == different
    tokenized_texts.clear()
    reranker.rank_batch(QUERIES, [DOCUMENTS] * len(QUERIES), cascade={2: 0.5, 4: 0.3})
    assert len(tokenized_texts) == different
    tokenized_texts.clear()
    inputs = reranker.tokenize(pairs)
    assert len(tokenized_texts) == different
    for layer, scores in zip([2, 4, 6], expected, strict=True):
        found = reranker.compute_score(inputs, cutoff_layers=layer, compress_layers=[2], compress_ratio=2)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(scores), atol=1e-5, rtol=0)
        reranker.estimate_flops(inputs, cutoff_layers=layer)
    reranker.score_lists([inputs[:20], inputs[20:40]], cascade={2: 0.5})
    assert len(tokenized_texts) == different


def test_few_pairs_are_tokenised_before_the_first_are_scored(reranker, monkeypatch):
    """And then twice as many each time, in whole lists where these are not longer."""
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_FIRST", 5)
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_AHEAD", 15)
    sizes = []
    tokenize = scoring.Call.tokenize

    def counted(call, pairs, first=0):
        sizes.append(len(pairs))
        return tokenize(call, pairs, first)

    monkeypatch.setattr(scoring.Call, "tokenize", counted)
    pairs = [("wing", document) for document in DOCUMENTS] * 2
    found = reranker.compute_score(pairs)
    assert sizes == [5, 10, 15, 10]
    assert found[:20] == pytest.approx(reranker.compute_score(pairs[20:], batch_size=1), abs=1e-5)
    sizes.clear()
    reranker.rank_batch(QUERIES[:6], [DOCUMENTS[:size] for size in (3, 4, 4, 12, 2, 20)])
    assert sizes == [3, 8, 14, 15, 5]


@pytest.mark.parametrize("options", [{}, {"cascade": {2: 0.5, 4: 0.3}}, {"cascade": {}}])
def test_tokenised_lists_score_as_their_texts_rank(reranker, options):
    expected = reranker.rank_batch(QUERIES[: len(LISTS)], LISTS, **options)
    inputs = [
        reranker.tokenize([(query, document) for document in documents])
        for query, documents in zip(QUERIES, LISTS, strict=False)
    ]
    for hits, ranking in zip(reranker.score_lists(inputs, **options), expected, strict=True):
        by_place = sorted(ranking, key=lambda hit: hit["corpus_id"])
        assert [{"corpus_id": place} | hit for place, hit in enumerate(hits)] == by_place


def test_candidates_of_a_query_hold_the_same_part_and_say_whether_they_were_cut(reranker):
    first, second, other = reranker.tokenize([("wing", "a"), ("wing", "air " * 300), ("flow", "a")], max_length=30)
    assert first.lead is second.lead and first.lead != other.lead
    assert first.lead == reranker.tokenize(("wing", "b"))[0].lead
    assert (first.is_cut, second.is_cut, other.is_cut) == (False, True, False)
    assert reranker.tokenize(("wing " * 40, "a"), max_length=30)[0].is_cut
    assert reranker.tokenize([]) == []


def test_what_says_how_texts_become_tokens_is_not_taken_beside_tokens(reranker):
    inputs = reranker.tokenize([("wing", "a")])
    calls = [(reranker.compute_score, inputs), (reranker.estimate_flops, inputs), (reranker.score_lists, [inputs])]
    for call, values in calls:
        with pytest.raises(TypeError, match=r"tokenised already; \{'max_length': 30\} goes to tokenize"):
            call(values, max_length=30)
    with pytest.raises(TypeError, match="pair 0 of list 0 must be one that tokenize made, got"):
        reranker.score_lists([[("wing", "a")]])
    with pytest.raises(TypeError, match="pair 0 must be a query and a passage"):
        reranker.compute_score([*inputs, ("wing", "a")])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [None, 4])
def test_min_score_leaves_out_what_is_lower_than_what_is_returned(reranker, normalize, top_k):
    expected = reranker.rank_batch(QUERIES[:3], [DOCUMENTS] * 3, top_k, normalize=normalize)
    least = expected[0][2]["score"]
    kept = [[hit for hit in ranking if hit["score"] >= least] for ranking in expected]
    assert len(kept[0]) == 3 and sum(map(len, kept)) < sum(map(len, expected))
    arguments = {"top_k": top_k, "normalize": normalize, "min_score": least}
    assert reranker.rank_batch(QUERIES[:3], [DOCUMENTS] * 3, **arguments) == kept
    rows = ((query, DOCUMENTS) for query in QUERIES[:3])
    assert list(reranker.rank_iter(rows, **arguments)) == kept
    (alone,) = [reranker.rank(QUERIES[0], DOCUMENTS, **arguments)]
    assert [hit["corpus_id"] for hit in alone] == [hit["corpus_id"] for hit in kept[0]]
    assert reranker.rank(QUERIES[0], DOCUMENTS, normalize=True, min_score=1.5) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cascade": {2: 0.5}}, r"min_score=0.5 beside cascade=\{2: 0.5\}: scores of different exits"),
        ({"deadline_ms": 1000}, r"min_score=0.5 beside deadline_ms=1000: scores of different exits"),
        ({"cascade": {2: 0.5}, "normalize": True}, "unless normalize='calibrated'"),
    ],
)
def test_min_score_is_not_compared_with_scores_of_several_exits(reranker, options, message):
    for documents in (DOCUMENTS, []):
        with pytest.raises(ValueError, match=message):
            reranker.rank(QUERIES[0], documents, min_score=0.5, **options)
    every = reranker.rank(QUERIES[0], DOCUMENTS, min_score=float("-inf"), **options)
    assert len(every) == len(DOCUMENTS)
    with pytest.raises(TypeError, match="min_score"):
        reranker.score_lists([reranker.tokenize([("q", "d")])], min_score=0.5)


@pytest.mark.parametrize("least", [float("nan"), True, "0.5"])
def test_a_min_score_that_is_no_number_is_refused(reranker, least):
    with pytest.raises(ValueError, match=r"min_score is .*, but must be a number"):
        reranker.rank(QUERIES[0], DOCUMENTS, min_score=least)
