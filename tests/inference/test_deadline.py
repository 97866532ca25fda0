import math
from functools import partial
from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.deadline import AnytimeRun, Deadline, Pace
from flagembedding_matryoshka.models.batch import PackedBatch
from flagembedding_matryoshka.models.decoder import PackedStates
from flagembedding_matryoshka.models.flops import reading_share
from flagembedding_matryoshka.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["wing", "flow", "body", "heat", "shock", "plate", "speed", "layer"]
DOCUMENTS = [" ".join(WORDS[(7 * i + j) % 8] for j in range(1 + 3 * i % 11)) for i in range(20)]
QUERY = "what about the wing"
WIDTHS = [{}, {"compress_layers": [2, 4], "compress_ratio": 2}]
EXITS = [2, 3, 4, 5, 6]


class LayerClock:
    """A clock that runs when layers do: a millisecond for each token of each."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    """Ranks in a time of its own, which is the same on every machine."""
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=3)
    reranker._clock = clock = LayerClock()
    reading = reading_share(reranker.config)

    def note(layer, given, options):
        clock.now += given[0].shape[1] / 1000 * (reading if options.get("only_last") else 1)

    for layer in reranker.model.model.layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    return reranker


def exits_of(hits):
    return {hit["corpus_id"]: hit["cutoff_layer"] for hit in hits}


def whole_time(reranker, **options):
    """Milliseconds that all documents take to the end."""
    before = reranker._clock.now
    reranker.rank(QUERY, DOCUMENTS, **options)
    return (reranker._clock.now - before) * 1000


@pytest.mark.parametrize("width", WIDTHS)
def test_more_time_leaves_nobody_less_deep_and_nobody_without_an_answer(reranker, width):
    whole = whole_time(reranker, **width)
    before, seen = dict.fromkeys(range(len(DOCUMENTS)), 2), set()
    for step in range(1, 45):
        found = exits_of(reranker.rank(QUERY, DOCUMENTS, deadline_ms=whole * step / 40, **width))
        assert found.keys() == before.keys()
        assert all(found[place] >= before[place] for place in found)
        seen.add(tuple(found.values()))
        before = found
    assert set(before.values()) == {6} and len(seen) > 8


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("share", [0.01, 0.6, 0.7, 2])
def test_scores_and_order_are_those_of_a_cascade_by_hand(reranker, share, width):
    hits = reranker.rank(QUERY, DOCUMENTS, batch_size=1, deadline_ms=share * whole_time(reranker, **width), **width)
    pairs = [(QUERY, text) for text in DOCUMENTS]
    scores = dict(zip(EXITS, reranker.compute_score(pairs, cutoff_layers=EXITS, **width), strict=True))
    stopped = exits_of(hits)
    order = sorted(stopped, key=lambda place: (-stopped[place], -scores[stopped[place]][place]))
    assert [hit["corpus_id"] for hit in hits] == order
    for hit in hits:
        assert hit["score"] == pytest.approx(scores[hit["cutoff_layer"]][hit["corpus_id"]], abs=1e-5)
    deeper = [scores[2][place] for place in order if stopped[place] > 2]
    shallow = [scores[2][place] for place in order if stopped[place] == 2]
    assert bool(shallow) == (share < 0.9) and bool(deeper) == (share > 0.01)
    assert min(deeper, default=math.inf) >= max(shallow, default=-math.inf) - 1e-5


@pytest.mark.parametrize("options", [*WIDTHS, {"cutoff_layers": [4]}, {"cutoff_layers": [2]}])
def test_any_time_is_full_depth_to_the_bit(reranker, options):
    depth = options.get("cutoff_layers", [6])[0]
    expected = [hit | {"cutoff_layer": depth} for hit in reranker.rank(QUERY, DOCUMENTS, **options)]
    assert reranker.rank(QUERY, DOCUMENTS, deadline_ms=math.inf, **options) == expected


@pytest.mark.parametrize("cascade", [{3: 0.5}, {2: 0.5, 4: 0.2}])
def test_a_cascade_says_how_many_go_deeper_at_most(reranker, cascade):
    expected = reranker.rank(QUERY, DOCUMENTS, cascade=cascade)
    found = reranker.rank(QUERY, DOCUMENTS, cascade=cascade, deadline_ms=math.inf)
    for hit, other in zip(found, expected, strict=True):  # candidates of several batches are in one
        assert hit == other | {"score": pytest.approx(other["score"], abs=1e-5)}
    whole = whole_time(reranker)
    for share in (0.4, 0.5, 0.6, 0.7):
        reached = exits_of(reranker.rank(QUERY, DOCUMENTS, cascade=cascade, deadline_ms=share * whole)).values()
        for layer, kept in cascade.items():
            assert sum(depth > layer for depth in reached) <= math.ceil(kept * len(DOCUMENTS))


def test_the_first_to_go_deeper_are_a_third_however_many_a_batch_holds(reranker):
    whole = whole_time(reranker, batch_size=100)
    for step in range(30, 100):
        limit = whole * step / 100
        reached = exits_of(reranker.rank(QUERY, DOCUMENTS, batch_size=100, deadline_ms=limit)).values()
        if deeper := sum(depth > 2 for depth in reached):
            break
    assert deeper == 7


def test_time_is_kept_and_used(reranker):
    """Each step is known to the millisecond here, so none begins that would not end in time."""
    whole = whole_time(reranker)
    for share in (0.45, 0.6, 0.75, 0.9, 1.0):
        took = whole_time(reranker, deadline_ms=share * whole)
        assert share * whole * 0.85 < took <= share * whole * 1.001


def test_each_of_several_queries_has_the_time(reranker):
    queries, candidates = [QUERY, "shock", "heat"], [DOCUMENTS, [], DOCUMENTS[:9]]
    limit = 0.7 * whole_time(reranker)
    alone = [reranker.rank(*one, deadline_ms=limit) for one in zip(queries, candidates, strict=True)]
    assert reranker.rank_batch(queries, candidates, deadline_ms=limit) == alone
    assert list(reranker.rank_iter(queries, candidates, deadline_ms=limit)) == alone
    assert any(set(exits_of(hits).values()) != {6} for hits in alone)


def test_time_for_the_query_counts_from_the_call(reranker, monkeypatch):
    of_pairs = reranker._pair_tokenizer.build
    limit = whole_time(reranker) * 1.5

    def slow(*arguments):
        reranker._clock.now += limit / 1000
        return of_pairs(*arguments)

    assert set(exits_of(reranker.rank(QUERY, DOCUMENTS, deadline_ms=limit)).values()) == {6}
    monkeypatch.setattr(reranker._pair_tokenizer, "build", slow)
    assert set(exits_of(reranker.rank(QUERY, DOCUMENTS, deadline_ms=limit)).values()) == {2}


def test_the_best_of_what_is_returned_and_its_sigmoid(reranker):
    limit = 0.6 * whole_time(reranker)
    ranked = reranker.rank(QUERY, DOCUMENTS, deadline_ms=limit)
    best = reranker.rank(QUERY, DOCUMENTS, top_k=4, normalize=True, return_documents=True, deadline_ms=limit)
    assert [hit["corpus_id"] for hit in best] == [hit["corpus_id"] for hit in ranked[:4]]
    assert [hit["text"] for hit in best] == [DOCUMENTS[hit["corpus_id"]] for hit in best]
    sigmoids = torch.tensor([hit["score"] for hit in ranked[:4]]).sigmoid()
    torch.testing.assert_close(torch.tensor([hit["score"] for hit in best]), sigmoids)


def test_a_document_comes_as_far_as_its_furthest_chunk(reranker, monkeypatch):
    documents = [DOCUMENTS[1], " ".join(WORDS * 30), DOCUMENTS[2]]
    options = {"chunk": True, "max_length": 64}
    hits = reranker.rank(QUERY, documents, **options, deadline_ms=1)
    assert exits_of(hits) == dict.fromkeys(range(3), 2)
    before = reranker._clock.now
    whole = reranker.rank(QUERY, documents, **options, deadline_ms=math.inf)
    took = 1000 * (reranker._clock.now - before)
    assert [hit["chunk"] for hit in whole] == [hit["chunk"] for hit in reranker.rank(QUERY, documents, **options)]
    monkeypatch.setattr(reranker, "max_length", 64)
    chunks = [document.chunks for document in reranker.cut_chunks(QUERY, documents)]
    for share in (0.5, 0.7, 0.8):
        (found,) = reranker.score_lists([[chunk.pair for chunk in chain(*chunks)]], deadline_ms=share * took)
        exits = iter([hit["cutoff_layer"] for hit in found])
        furthest = {place: max(islice(exits, len(own))) for place, own in enumerate(chunks)}
        assert exits_of(reranker.rank(QUERY, documents, **options, deadline_ms=share * took)) == furthest


def test_what_is_tokenised_has_the_time_from_there(reranker):
    inputs = reranker.tokenize([(QUERY, text) for text in DOCUMENTS])
    (hits,) = reranker.score_lists([inputs], deadline_ms=0.6 * whole_time(reranker))
    assert len({hit["cutoff_layer"] for hit in hits}) > 1


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "deadline_ms is 0, but must be above 0, or None for no deadline"),
        (-3.5, ValueError, "deadline_ms is -3.5, but must be above 0"),
        (math.nan, ValueError, "deadline_ms is nan, but must be above 0"),
        (True, TypeError, "deadline_ms must be a number, or None for no deadline, got True"),
        ("50", TypeError, "deadline_ms must be a number, or None for no deadline, got '50'"),
    ],
)
def test_what_is_no_time_is_refused(reranker, value, error, message):
    lists = [[reranker.tokenize((QUERY, "wing"))[0]]]
    for call in (
        partial(reranker.rank, QUERY, DOCUMENTS),
        partial(reranker.rank_batch, [QUERY], [DOCUMENTS]),
        partial(reranker.rank_iter, [QUERY], [DOCUMENTS]),
        partial(reranker.score_lists, lists),
    ):
        with pytest.raises(error, match=message):
            call(deadline_ms=value)


def test_real_time_is_kept(tiny_layerwise_path):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=8)
    documents = DOCUMENTS * 20
    passed = exits_of(reranker.rank(QUERY, documents, deadline_ms=1))  # the first exit alone takes longer
    assert len(passed) == len(documents) and set(passed.values()) == {2}
    assert len(reranker.rank(QUERY, documents, deadline_ms=100)) == len(documents)
    # If the deadline was waited for, pytest would end the test.
    assert set(exits_of(reranker.rank(QUERY, documents, deadline_ms=600_000)).values()) == {6}


def anytime(sizes, share, exits=range(4, 33), cascade=(), between=None):
    """Numbers of sequences in each call of the model, and the exits, with a share of the time of all."""
    clock, calls, generator = LayerClock(), [], torch.Generator().manual_seed(0)

    def score(states, layer):
        calls.append(len(states.packed.sequences))
        clock.now += (layer - states.layers_run) * states.hidden.shape[1]
        states.layers_run = layer - 1
        return torch.rand(calls[-1], generator=generator)

    batches = []
    for size in sizes:
        lengths = torch.tensor([[2, 0, 0], *[[0, 3, 1]] * size]).T
        prefixes = torch.tensor([-1, *[0] * size])
        packed = PackedBatch(*lengths, torch.device("cpu"), prefixes=prefixes)
        batches.append(PackedStates(torch.zeros(1, 2 + 4 * size, 1), packed))
    whole = exits[-1] * sum(states.hidden.shape[1] for states in batches)
    deadline = Deadline(share * whole, clock).start()
    before_step = None if between is None else partial(between, calls)
    run = AnytimeRun(score, batches, Setting((exits[-1],), cascade=cascade), exits, 1.0, deadline, before_step)
    _, reached, _ = run.run()
    return calls, reached


@pytest.mark.parametrize("share", [0.01, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.3, math.inf])
def test_a_thousand_candidates_of_a_deep_model_take_few_calls_and_a_fit_each(share, monkeypatch):
    fits = []
    of_pace = Pace._fit
    monkeypatch.setattr(Pace, "_fit", lambda pace, *point: fits.append(point) or of_pace(pace, *point))
    calls, reached = anytime([1000], share)
    assert len(calls) <= 30 and len(fits) == len(calls)
    assert len(reached) == 1000 and reached.min() >= 4
    assert (share > 1.2) == (set(reached.tolist()) == {32}) or share in (1.0, 1.1)


@pytest.mark.parametrize("share", [0.4, 0.8, 1.2])
def test_candidates_of_several_batches_that_wait_at_an_exit_fill_batches(share):
    few, _ = anytime([1000], share)
    calls, _ = anytime([100] * 10, share)
    assert max(calls) <= 100
    assert len(calls) <= sum(calls) / 100 + 2 * len(few)


@pytest.mark.parametrize("share", [0.01, 0.4, 0.8])
def test_others_run_before_a_step_and_not_before_an_answer(share):
    """Once there is no time for another step, nobody else makes the answer later."""
    calls_before = []
    calls, _ = anytime([100] * 3, share, between=lambda calls: calls_before.append(len(calls)))
    assert calls_before == list(range(len(calls)))


def test_a_cascades_exits_are_among_the_stops():
    _, reached = anytime([100], math.inf, cascade={20: 0.25})
    assert {layer: int((reached == layer).sum()) for layer in reached.unique().tolist()} == {20: 75, 32: 25}


@given(st.floats(0, 5), st.floats(0.01, 5), st.lists(st.integers(1, 1000), min_size=2, max_size=9, unique=True))
def test_pace_is_what_layers_and_tokens_have_taken(of_layer, of_token, sizes):
    clock = LayerClock()
    pace = Pace(clock)
    assert pace.seconds(3, 100) == 0
    for size in sizes:
        with pace.measured(2, 2 * size):
            clock.now += 2 * (of_layer + of_token * size)
    assert pace.seconds(3, 3 * 70) == pytest.approx(3 * (of_layer + of_token * 70), rel=1e-4)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(1, 1000), st.floats(0, 9)), min_size=1, max_size=9))
def test_no_pace_is_below_nothing(measured):
    clock = LayerClock()
    pace = Pace(clock)
    for layers, tokens, seconds in measured:
        with pace.measured(layers, tokens):
            clock.now += seconds
    for tokens in (1, 100, 10_000):
        assert pace.seconds(1, tokens) >= 0


def test_a_deadline_starts_once():
    clock = LayerClock()
    deadline = Deadline.of(2000, clock)
    clock.now = 1.0
    assert deadline.left == 2.0
    started = deadline.start()
    clock.now = 2.5
    assert started.start() is started and started.left == 0.5
