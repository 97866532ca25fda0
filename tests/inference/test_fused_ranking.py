"""Rankings by scores that are fused with those of the first stage."""

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference import scoring
from flagembedding_matryoshka.inference.fusion import fuse, reciprocal_ranks
from flagembedding_matryoshka.inference.memory import TokenLimit
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan
from flagembedding_matryoshka.models.flops import reading_share
from flagembedding_matryoshka.setting import Setting
from tests.batches import out_of_memory_above

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["wing", "flow", "body", "heat", "shock", "plate", "speed", "layer"]
DOCUMENTS = [" ".join(WORDS[(7 * i + j) % 8] for j in range(1 + 3 * i % 11)) for i in range(20)]
FIRST = [round(10 * math.sin(3 * number), 2) for number in range(20)]
QUERY = "what about the wing"
QUERIES = [QUERY, "the flow of heat", "shock", "plate", "cone"]
LISTS = [DOCUMENTS, DOCUMENTS[:5], DOCUMENTS[3:9], DOCUMENTS[:1], []]
FIRSTS = [FIRST, FIRST[2:7], FIRST[6:12], [3.0], []]
DEPTHS = [{}, {"cascade": {2: 0.5, 4: 0.2}}, {"deadline_ms": math.inf}, {"cascade": {3: 0.4}, "deadline_ms": math.inf}]
LONG = ["air flows", " ".join(WORDS * 9), "", "1234567890" * 20, "heat", " ".join(WORDS[::-1] * 12)]
CHUNKS = {"chunk": True, "max_length": 40, "query_max_length": 20}


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=7)


def places(hits):
    return [hit["corpus_id"] for hit in hits]


def close(rankings, expected):
    for ours, theirs in zip(rankings, expected, strict=True):
        assert places(ours) == places(theirs)
        for name in ("score", "fused_score", "first_stage_score"):
            assert [hit[name] for hit in ours] == pytest.approx([hit[name] for hit in theirs], abs=1e-4)
        assert [hit.get("cutoff_layer") for hit in ours] == [hit.get("cutoff_layer") for hit in theirs]


def by_hand(values, first, weight):
    """{place: fused score} of the formula, among the candidates of `values`."""

    def standard(numbers):
        mean = sum(numbers) / len(numbers)
        deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers))
        return [(number - mean) / deviation if deviation else 0.0 for number in numbers]

    both = zip(standard(list(values.values())), standard([first[place] for place in values]), strict=True)
    return {place: own + weight * other for place, (own, other) in zip(values, both, strict=True)}


def slow_cascade(scores, stages, first, weight):
    """(place, exit, fused score) from the best, given the scores of all candidates at all exits."""
    running, stopped = list(range(len(first))), []
    for layer, share in [*stages, (6, None)]:
        count = 0 if share is None else math.ceil(round(share * len(first), 9))
        if len(running) <= count:
            continue
        fused = by_hand({place: scores[layer][place] for place in running}, first, weight)
        running.sort(key=lambda place: -fused[place])
        stopped = [(place, layer, fused[place]) for place in running[count:]] + stopped
        running = sorted(running[:count])
    return stopped


def exit_scores(reranker, documents, **width):
    exits = [2, 3, 4, 5, 6]
    columns = reranker.compute_score([(QUERY, text) for text in documents], cutoff_layers=exits, **width)
    return dict(zip(exits, columns, strict=True))


@pytest.mark.parametrize("weight", [0, 0.35, 1, 50.0])
def test_documents_rank_by_the_formula(reranker, weight):
    scores = dict(enumerate(reranker.compute_score([(QUERY, text) for text in DOCUMENTS])))
    expected = by_hand(scores, FIRST, weight)
    hits = reranker.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST, fusion=weight, return_documents=True)
    assert places(hits) == sorted(expected, key=lambda place: -expected[place])
    for hit in hits:
        place = hit["corpus_id"]
        assert hit["fused_score"] == pytest.approx(expected[place], abs=1e-5)
        assert hit["score"] == pytest.approx(scores[place], abs=1e-5)
        assert (hit["first_stage_score"], hit["text"]) == (FIRST[place], DOCUMENTS[place])


@pytest.mark.parametrize("options", [*DEPTHS, {"normalize": True}, {"cutoff_layers": 4}, CHUNKS])
def test_a_weight_of_zero_is_the_plain_order(reranker, options):
    plain = reranker.rank(QUERY, DOCUMENTS * 2, **options)  # every document has a tie
    fused = reranker.rank(QUERY, DOCUMENTS * 2, first_stage_scores=FIRST * 2, fusion=0, **options)
    extra = ("first_stage_score", "fused_score")
    assert [{name: value for name, value in hit.items() if name not in extra} for hit in fused] == plain
    assert all(set(extra) <= hit.keys() for hit in fused)


@pytest.mark.parametrize("width", [{}, {"compress_layers": [2, 4], "compress_ratio": 2}])
@pytest.mark.parametrize("stages", [[(2, 0.5), (4, 0.2)], [(3, 0.31)], [(2, 1.0), (4, 0.5)], [(2, 0.01), (5, 0.01)]])
def test_a_cascade_drops_by_the_fused_score(reranker, stages, width):
    options = {"cascade": dict(stages), "first_stage_scores": FIRST, "fusion": 0.7} | width
    expected = slow_cascade(exit_scores(reranker, DOCUMENTS, **width), stages, FIRST, 0.7)
    hits = reranker.rank(QUERY, DOCUMENTS, **options)
    assert [(hit["corpus_id"], hit["cutoff_layer"]) for hit in hits] == [row[:2] for row in expected]
    assert [hit["fused_score"] for hit in hits] == pytest.approx([row[2] for row in expected], abs=1e-4)
    plain = reranker.rank(QUERY, DOCUMENTS, cascade=dict(stages), **width)
    assert stages[-1][1] == 0.01 or places(plain) != places(hits)


def test_first_stage_scores_stay_with_their_candidates_when_batches_do_not_fit(reranker, monkeypatch):
    for depth in DEPTHS[:3]:
        options = {"first_stage_scores": FIRST, "fusion": 0.7} | depth
        expected = reranker.rank(QUERY, DOCUMENTS, **options)
        with monkeypatch.context() as short:
            short.setattr(reranker._engine, "_limit", TokenLimit())
            short.setattr(reranker.model.model, "embed", out_of_memory_above(reranker.model.model, 2))
            close([reranker.rank(QUERY, DOCUMENTS, **options)], [expected])


class LayerClock:
    """A clock that advances by a millisecond for each token of each layer that runs."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def timed(tiny_layerwise_path):
    """A function that ranks with `LayerClock`, one document in a batch."""
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=1)
    reranker._clock = clock = LayerClock()
    reading = reading_share(reranker.config)

    def note(layer, given, options):
        clock.now += given[0].shape[1] / 1000 * (reading if options.get("only_last") else 1)

    for layer in reranker.model.model.layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    return reranker


@pytest.mark.parametrize("share", [0.01, 0.46, 0.65])
def test_until_a_deadline_the_best_by_the_fused_score_go_deeper(timed, share):
    before = timed._clock.now
    timed.rank(QUERY, DOCUMENTS)
    limit = share * (timed._clock.now - before) * 1000
    hits = timed.rank(QUERY, DOCUMENTS, deadline_ms=limit, first_stage_scores=FIRST, fusion=0.7)
    scores = exit_scores(timed, DOCUMENTS)
    reached = {hit["corpus_id"]: hit["cutoff_layer"] for hit in hits}
    expected = {}
    for layer in set(reached.values()):
        own = {place: scores[layer][place] for place in range(20) if reached[place] == layer}
        expected |= by_hand(own, FIRST, 0.7)
    assert places(hits) == sorted(reached, key=lambda place: (-reached[place], -expected[place]))
    assert [hit["fused_score"] for hit in hits] == pytest.approx([expected[place] for place in places(hits)], abs=1e-4)
    fused = by_hand(dict(enumerate(scores[2])), FIRST, 0.7)
    deeper = {place for place in reached if reached[place] > 2}
    first = sorted(fused, key=lambda place: -fused[place])[:7]  # a third of all, the width of the first cascade
    assert not deeper or deeper >= set(first)
    assert bool(deeper) == (share > 0.01) and len(deeper) < len(DOCUMENTS)


def test_a_late_deadline_gives_the_fused_ranking_at_full_depth(reranker):
    options = {"first_stage_scores": FIRST, "fusion": 0.7}
    (expected,), (found,) = ([reranker.rank(QUERY, DOCUMENTS, **options, **depth)] for depth in DEPTHS[::2])
    close([[hit | {"cutoff_layer": 6} for hit in expected]], [found])


def test_a_late_deadline_with_a_cascade_gives_the_cascade(reranker):
    options = {"cascade": {3: 0.4}, "first_stage_scores": FIRST, "fusion": 0.7}
    expected, found = (reranker.rank(QUERY, DOCUMENTS, **options, **time) for time in ({}, {"deadline_ms": math.inf}))
    last = [[hit for hit in hits if hit["cutoff_layer"] == 6] for hits in (expected, found)]
    assert len(last[0]) == 8
    close([last[0]], [last[1]])
    own = {hit["corpus_id"]: hit["score"] for hit in found[8:]}
    assert [hit["fused_score"] for hit in found[8:]] == pytest.approx(
        sorted(by_hand(own, FIRST, 0.7).values(), reverse=True), abs=1e-4
    )


@pytest.mark.parametrize("depth", [*DEPTHS[:2], {"top_k": 2, "batch_size": 2}])
def test_many_queries_rank_as_each_alone(reranker, depth, monkeypatch):
    alone = [
        reranker.rank(query, documents, first_stage_scores=first, fusion=0.5, **depth)
        for query, documents, first in zip(QUERIES, LISTS, FIRSTS, strict=True)
    ]
    options = {"fusion": 0.5} | depth
    together = reranker.rank_batch(QUERIES, LISTS, first_stage_scores=FIRSTS, **options)
    close(together, alone)
    rows = zip(QUERIES, map(iter, LISTS), strict=True)
    assert list(reranker.rank_iter(rows, first_stage_scores=map(iter, FIRSTS), **options)) == together
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_AHEAD", 4)
    close(list(reranker.rank_iter(QUERIES, LISTS, first_stage_scores=FIRSTS, **options)), alone)
    assert together[-1] == [] and together[-2][0]["fused_score"] == 0.0


@pytest.mark.parametrize("options", [*DEPTHS, CHUNKS])
def test_the_order_is_its_reciprocal_ranks(reranker, options):
    expected = reranker.rank_batch(
        QUERIES, LISTS, first_stage_scores=[reciprocal_ranks(len(one)) for one in LISTS], fusion=0.9, **options
    )
    found = reranker.rank_batch(QUERIES, LISTS, first_stage="order", fusion=0.9, **options)
    assert found == expected
    assert [hit["first_stage_score"] for hit in found[0]] == [1 / (61 + place) for place in places(found[0])]
    assert list(reranker.rank_iter(QUERIES, LISTS, first_stage="order", fusion=0.9, **options)) == expected
    assert reranker.rank(QUERY, DOCUMENTS, first_stage="order", fusion=1e6)[0]["corpus_id"] == 0


@pytest.mark.parametrize("options", DEPTHS)
def test_a_missing_score_is_the_lowest_and_equal_ones_change_no_order(reranker, options):
    some = [None if number % 3 else value for number, value in enumerate(FIRST)]
    lowest = min(value for value in some if value is not None)
    filled = [lowest if value is None else value for value in some]
    found = reranker.rank(QUERY, DOCUMENTS, first_stage_scores=some, fusion=0.5, **options)
    assert found == reranker.rank(QUERY, DOCUMENTS, first_stage_scores=filled, fusion=0.5, **options)
    plain = places(reranker.rank(QUERY, DOCUMENTS, **options))
    for equal in ([0.1] * 20, [None] * 20):
        hits = reranker.rank(QUERY, DOCUMENTS, first_stage_scores=equal, fusion=9, **options)
        assert places(hits) == plain and all(math.isfinite(hit["fused_score"]) for hit in hits)


def test_first_stage_scores_may_be_an_array_or_integers(reranker):
    numbers = [round(value) for value in FIRST]
    expected = reranker.rank(QUERY, DOCUMENTS, first_stage_scores=numbers, fusion=0.5)
    array = torch.tensor(numbers).double().numpy()
    for values in (array, torch.tensor(numbers), torch.tensor(numbers).bfloat16()):
        assert reranker.rank(QUERY, DOCUMENTS, first_stage_scores=values, fusion=0.5) == expected
    assert reranker.rank_batch([QUERY], [DOCUMENTS], first_stage_scores=array[None], fusion=0.5) == [expected]


@pytest.mark.parametrize("fusion", [0.0, 0.6])
def test_the_best_chunk_by_the_model_is_fused_with_its_document(reranker, fusion):
    first = [1.0, 5.0, 2.0, 8.0, 8.0, -3.0]
    plain = {hit["corpus_id"]: hit for hit in reranker.rank(QUERY, LONG, **CHUNKS)}
    hits = reranker.rank(QUERY, LONG, first_stage_scores=first, fusion=fusion, **CHUNKS)
    fused = by_hand({place: plain[place]["score"] for place in range(len(LONG))}, first, fusion)
    assert places(hits) == sorted(fused, key=lambda place: -fused[place])
    for hit in hits:
        assert hit.pop("fused_score") == pytest.approx(fused[hit["corpus_id"]], abs=1e-5)
        assert hit.pop("first_stage_score") == first[hit["corpus_id"]]
        assert hit == plain[hit["corpus_id"]]


def test_in_a_cascade_a_chunk_has_the_first_stage_score_of_its_document(reranker):
    first, stages = [1.0, 5.0, 2.0, 8.0, 8.0, -3.0], [(2, 0.6), (4, 0.3)]
    lengths = {name: value for name, value in CHUNKS.items() if name != "chunk"}
    cut = reranker.cut_chunks(QUERY, LONG, **lengths)
    owner = [number for number, document in enumerate(cut) for _ in document.chunks]
    parts = [LONG[number][chunk.start : chunk.end] for number, document in enumerate(cut) for chunk in document.chunks]
    assert len(parts) > 12
    expected = slow_cascade(exit_scores(reranker, parts, **lengths), stages, [first[number] for number in owner], 0.6)
    best = {}
    for place, layer, fused in expected:
        best.setdefault(owner[place], (layer, fused))
    hits = reranker.rank(QUERY, LONG, first_stage_scores=first, fusion=0.6, cascade=dict(stages), **CHUNKS)
    assert [(hit["corpus_id"], hit["cutoff_layer"]) for hit in hits] == [(n, best[n][0]) for n in best]
    assert [hit["fused_score"] for hit in hits] == pytest.approx([fused for _, fused in best.values()], abs=1e-4)
    assert [hit["first_stage_score"] for hit in hits] == [first[number] for number in best]


def test_min_score_is_compared_with_the_score_and_top_k_cuts_the_fused_order(reranker):
    options = {"first_stage_scores": FIRST, "fusion": 3.0, "normalize": True}
    hits = reranker.rank(QUERY, DOCUMENTS, **options)
    assert places(reranker.rank(QUERY, DOCUMENTS, top_k=4, **options)) == places(hits)[:4]
    least = sorted(hit["score"] for hit in hits)[12]
    kept = reranker.rank(QUERY, DOCUMENTS, min_score=least, **options)
    assert kept == [hit for hit in hits if hit["score"] >= least] and len(kept) == 8
    for top_k in (1, 4, 10):  # those that are left out take no place
        assert reranker.rank(QUERY, DOCUMENTS, top_k=top_k, min_score=least, **options) == kept[:top_k]
    raw = reranker.rank(QUERY, DOCUMENTS, **options | {"normalize": False})
    assert [hit["fused_score"] for hit in raw] == [hit["fused_score"] for hit in hits]


@pytest.mark.parametrize("options", DEPTHS)
def test_tokenised_lists_are_fused_as_their_texts(reranker, options):
    lists = [reranker.tokenize([(QUERY, text) for text in documents]) for documents in (DOCUMENTS, DOCUMENTS[:3])]
    first = [FIRST, FIRST[:3]]
    found = reranker.score_lists(lists, first_stage_scores=first, fusion=0.5, **options)
    for hits, documents, own in zip(found, (DOCUMENTS, DOCUMENTS[:3]), first, strict=True):
        ranking = reranker.rank(QUERY, documents, first_stage_scores=own, fusion=0.5, **options)
        by_place = sorted(ranking, key=lambda hit: hit["corpus_id"])
        close([[{"corpus_id": place} | hit for place, hit in enumerate(hits)]], [by_place])
    plain = reranker.score_lists(lists, **options)
    assert all("fused_score" not in hit for hits in plain for hit in hits)


def test_each_query_may_have_an_instruction_beside_its_scores(reranker):
    expected = reranker.rank_batch(QUERIES, LISTS, first_stage_scores=FIRSTS, fusion=0.5)
    options = {"first_stage_scores": FIRSTS, "fusion": 0.5, "instruction": [None] * 5}
    close(reranker.rank_batch(QUERIES, LISTS, **options), expected)
    close(list(reranker.rank_iter(QUERIES, LISTS, **options)), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"first_stage_scores": FIRST}, ValueError, "first_stage_scores and first_stage need a weight: give fusion="),
        ({"first_stage": "order"}, ValueError, "first_stage_scores and first_stage need a weight: give fusion="),
        ({"fusion": 0.5}, ValueError, "fusion=0.5 needs the first stage's scores: give first_stage_scores, or"),
        ({"fusion": 0}, ValueError, "fusion=0 needs the first stage's scores"),
        (
            {"first_stage_scores": FIRST, "first_stage": "order", "fusion": 1},
            ValueError,
            "first_stage_scores and first_stage='order': give one of them",
        ),
        ({"first_stage": "ranks", "fusion": 1}, ValueError, "first_stage is 'ranks', but must be 'order' or None"),
        ({"first_stage_scores": FIRST[1:], "fusion": 1}, ValueError, "query 0 has 19 first_stage_scores, but 20"),
        ({"first_stage_scores": [math.nan] * 20, "fusion": 1}, ValueError, "of query 0: value 0 is nan"),
        ({"first_stage_scores": [10**400] * 20, "fusion": 1}, ValueError, "value 0 is 1000+.*, but must be finite"),
        ({"first_stage_scores": ["1"] * 20, "fusion": 1}, TypeError, "value 0 must be a number, or None, got '1'"),
        ({"first_stage_scores": {3: 1.0}, "fusion": 1}, TypeError, "first_stage_scores of query 0 must be a list"),
        ({"first_stage_scores": FIRST, "fusion": -1}, ValueError, "fusion is -1, but must be finite and at least 0"),
        ({"first_stage_scores": FIRST, "fusion": math.inf}, ValueError, "fusion is inf, but must be finite"),
        ({"first_stage_scores": FIRST, "fusion": 10**400}, ValueError, "fusion is 1000+.*, but must be finite"),
        ({"first_stage_scores": FIRST, "fusion": "best"}, TypeError, "fusion must be a number, 'auto' or None, got"),
        ({"first_stage_scores": FIRST, "fusion": "auto"}, FileNotFoundError, "fusion='auto' .*with --fusion also"),
    ],
)
def test_invalid_options_are_refused_before_computation(reranker, options, error, message, monkeypatch):
    monkeypatch.setattr(reranker._engine, "run", lambda *_, **__: pytest.fail("something is computed"))
    with pytest.raises(error, match=message):
        reranker.rank(QUERY, DOCUMENTS, **options)
    several = {name: [value] if name == "first_stage_scores" else value for name, value in options.items()}
    with pytest.raises(error, match=message):
        reranker.rank_batch([QUERY], [DOCUMENTS], **several)
    with pytest.raises(error, match=message):
        list(reranker.rank_iter([QUERY], [DOCUMENTS], **several))
    if "first_stage" not in options:
        pairs = [(QUERY, text) for text in DOCUMENTS]
        with pytest.raises(error, match=message):
            reranker.score_lists([reranker.tokenize(pairs)], **several)


@pytest.mark.parametrize("count", [1, 3])
def test_each_query_needs_a_list_of_scores(reranker, count, monkeypatch):
    named = "list 1 is missing" if count == 1 else "query 2 is missing"
    options = {"first_stage_scores": [[1.0]] * count, "fusion": 1}
    rankings = reranker.rank_iter(["a", "b"], [["c"], ["d"]], **options)
    with pytest.raises(ValueError, match=f"first_stage_scores.*, but {named}"):
        list(rankings)
    monkeypatch.setattr(reranker._engine, "run", lambda *_, **__: pytest.fail("something is computed"))
    with pytest.raises(ValueError, match=f"first_stage_scores.*, but {named}"):
        reranker.rank_batch(["a", "b"], [["c"], ["d"]], **options)


def test_a_stream_raises_the_fault_of_a_list_when_it_is_read(reranker, monkeypatch):
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_AHEAD", 1)
    scores = iter([[1.0]] * 5 + [[math.nan]])
    rankings = reranker.rank_iter(["a"] * 6, [["d"]] * 6, first_stage_scores=scores, fusion=1)
    assert len(next(rankings)) == 1
    with pytest.raises(ValueError, match="first_stage_scores of query 5: value 0 is nan"):
        list(rankings)
    for wrong in ("scores", 7):
        with pytest.raises(TypeError, match="first_stage_scores must be a list"):
            reranker.rank_iter([], [], first_stage_scores=wrong, fusion=1)


def test_calls_that_do_not_rank_refuse_a_weight_by_its_name(reranker):
    pairs = [(QUERY, "wing")]
    for call in (
        partial(reranker.compute_score, pairs),
        partial(reranker.tokenize, pairs),
        partial(reranker.estimate_flops, pairs),
        partial(reranker.count_tokens, QUERY, ["wing"]),
        partial(reranker.cut_chunks, QUERY, ["wing"]),
    ):
        with pytest.raises(TypeError, match=r"fusion=0.5 is an argument of rankings"):
            call(fusion=0.5)
        call(fusion=None)
    assert reranker.setting(fusion=0.5) == Setting(6) and reranker.normalizer(fusion=0.5) is None
    with pytest.raises(ValueError, match="fusion is -1"):
        reranker.setting(fusion=-1)


def test_a_nan_score_is_an_error_with_fusion(reranker, monkeypatch):
    scores = reranker.model.scores

    def broken_at_the_first_exit(states, setting, layers):
        found = scores(states, setting, layers)
        if layers == (2,):
            found[0, 0] = math.nan
        return found

    monkeypatch.setattr(reranker.model, "scores", broken_at_the_first_exit)
    with pytest.raises(ArithmeticError, match="not a number"):
        reranker.rank(QUERY, DOCUMENTS, cascade={2: 0.5}, first_stage_scores=FIRST, fusion=0.5)


def test_the_default_weight_is_for_rankings_with_first_stage_scores(tiny_layerwise_path, reranker):
    own = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=7, fusion=0.7)
    assert own.fusion == 0.7
    assert own.rank(QUERY, DOCUMENTS) == reranker.rank(QUERY, DOCUMENTS)
    assert own.compute_score((QUERY, "wing")) == reranker.compute_score((QUERY, "wing"))
    for fusion in (None, 0.2):
        expected = reranker.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST, fusion=fusion or 0.7)
        assert own.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST, fusion=fusion) == expected


PLAN = Plan(
    exit_layers=(2, 3, 4, 5, 6),
    adapters=(),
    data="d/test",
    queries=9,
    candidates="BM25's first 10",
    settings=(Measurement(Setting(6, cascade=((3, 0.25),)), 0.6, 0.9), Measurement(Setting(3), 0.5, 0.8)),
    fusion=0.4,
)


@pytest.fixture
def planned(tiny_layerwise_path, tmp_path):
    """A function that loads a model with a plan."""
    path = Path(shutil.copytree(tiny_layerwise_path, tmp_path / "model"))

    def load(plan, **options):
        plan.write(path / PLAN_NAME)
        return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", batch_size=7, **options)

    return load


@pytest.mark.filterwarnings("ignore:.*names no weights")
def test_a_plan_gives_the_weight_for_a_budget_and_for_auto(planned, reranker):
    expected = reranker.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST, fusion=0.4)
    followed = planned(PLAN, budget=0.7)
    of_cascade = reranker.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST, fusion=0.4, cascade={3: 0.25})
    assert followed.fusion == 0.4 and followed.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST) == of_cascade
    assert followed.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST, cutoff_layers=6) == expected
    assert planned(PLAN, budget=0.7, fusion=0.1).fusion == 0.1
    asked = planned(PLAN, fusion="auto")
    assert asked.fusion == 0.4 and asked.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST) == expected
    plain = planned(PLAN)
    assert plain.fusion is None
    assert plain.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST, fusion="auto") == expected
    with pytest.raises(ValueError, match="need a weight"):
        plain.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST)


@pytest.mark.filterwarnings("ignore:.*names no weights")
def test_a_plan_without_a_weight_gives_none(planned):
    without = replace(PLAN, fusion=None)
    followed = planned(without, budget=0.7)
    with pytest.raises(ValueError, match="need a weight"):
        followed.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST)
    message = "fusion='auto': the plan of d/test has no fusion weight. An evaluation with --fusion --write_plan"
    with pytest.raises(ValueError, match=message):
        followed.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST, fusion="auto")
    with pytest.raises(ValueError, match=message):
        planned(without, fusion="auto")


@pytest.mark.slow
def test_several_devices_fuse_as_one(tiny_layerwise_path, reranker):
    with MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices=["cpu", "cpu"], batch_size=7) as two:
        for options in DEPTHS:
            arguments = {"first_stage_scores": FIRSTS, "fusion": 0.7} | options
            expected = reranker.rank_batch(QUERIES, LISTS, **arguments)
            close(two.rank_batch(QUERIES, LISTS, **arguments), expected)


def test_fused_scores_are_those_of_fuse(reranker):
    scores = torch.tensor(reranker.compute_score([(QUERY, text) for text in DOCUMENTS]))
    fused = fuse(scores, torch.tensor(FIRST), 0.35)
    hits = reranker.rank(QUERY, DOCUMENTS, first_stage_scores=FIRST, fusion=0.35)
    assert places(hits) == fused.argsort(descending=True, stable=True).tolist()
