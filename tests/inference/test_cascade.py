import math
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference import engine
from flagembedding_matryoshka.inference.cascade import _best_of_each_query, finish, run_cascade
from flagembedding_matryoshka.inference.engine import Engine
from flagembedding_matryoshka.inference.memory import TokenLimit
from flagembedding_matryoshka.models.batch import PackedBatch, row_indices
from flagembedding_matryoshka.models.decoder import PackedStates
from flagembedding_matryoshka.setting import Setting, share_of
from tests.batches import close, out_of_memory_above

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["wing", "flow", "body", "heat", "shock", "plate", "speed", "layer"]
DOCUMENTS = [" ".join(WORDS[(7 * i + j) % 8] for j in range(1 + 3 * i % 11)) for i in range(20)]
QUERIES = ["what about the wing", "the flow of heat", "shock"]
WIDTHS = [{}, {"compress_layers": [2, 4], "compress_ratio": 2}]


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=7)


def slow_cascade(reranker, query, documents, stages, **width):
    """Scores of all exits first, then who would have been dropped where; (corpus_id, exit) from the best."""
    exits = [*dict(stages), 6]
    columns = reranker.compute_score([(query, text) for text in documents], cutoff_layers=exits, **width)
    scores = dict(zip(exits, columns, strict=True))
    alive, order = list(range(len(documents))), []
    for layer, share in stages:
        alive.sort(key=lambda index: -scores[layer][index])
        count = math.ceil(share * len(documents))
        order = [(index, layer) for index in alive[count:]] + order
        alive = alive[:count]
    alive.sort(key=lambda index: -scores[6][index])
    return [(index, 6) for index in alive] + order, scores


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("stages", [[(2, 0.5), (4, 0.2)], [(3, 0.31)], [(2, 1.0)], [(2, 0.01), (5, 0.01)]])
def test_equals_dropping_by_hand(reranker, stages, width):
    expected, scores = slow_cascade(reranker, QUERIES[0], DOCUMENTS, stages, **width)
    ranked = reranker.rank(QUERIES[0], DOCUMENTS, cascade=dict(stages), **width)
    assert [(item["corpus_id"], item["cutoff_layer"]) for item in ranked] == expected
    for item in ranked:
        assert item["score"] == pytest.approx(scores[item["cutoff_layer"]][item["corpus_id"]], abs=1e-5)


def test_many_queries_rank_as_each_alone(reranker):
    candidates = [DOCUMENTS, DOCUMENTS[:5], DOCUMENTS[3:9]]
    options = {"cascade": {2: 0.5, 4: 0.4}, "top_k": 2, "return_documents": True}
    together = reranker.rank_batch(QUERIES, candidates, **options)
    for query, documents, ranked in zip(QUERIES, candidates, together, strict=True):
        alone = reranker.rank(query, documents, **options)
        assert [item["corpus_id"] for item in ranked] == [item["corpus_id"] for item in alone]
        assert [item["text"] for item in ranked] == [documents[item["corpus_id"]] for item in ranked]
        torch.testing.assert_close(*(torch.tensor([i["score"] for i in r]) for r in (ranked, alone)), atol=1e-5, rtol=0)


def test_queries_wait_for_each_other_in_windows_and_rank_the_same(reranker, monkeypatch):
    candidates = [DOCUMENTS, DOCUMENTS[:5], DOCUMENTS[3:9], DOCUMENTS[:1], []]
    arguments = ([*QUERIES, "plate", "cone"], candidates)
    expected = reranker.rank_batch(*arguments, cascade={2: 0.5, 4: 0.4})
    together = []
    of_engine = Engine.start

    def noting(self, task, between_batches):
        together.append([owner for batch in task.owners for owner in batch])
        return of_engine(self, task, between_batches)

    monkeypatch.setattr(Engine, "start", noting)
    monkeypatch.setattr("flagembedding_matryoshka.inference.scoring.BATCHES_AT_ONCE", 1)
    found = reranker.rank_batch(*arguments, cascade={2: 0.5, 4: 0.4}, max_tokens_per_batch=300)
    assert len(together) > 1 and sorted(owner for window in together for owner in window) == sorted(
        number for number, documents in enumerate(candidates) for _ in documents
    )
    assert sum(len(set(window)) for window in together) == 4  # no query is in two of them
    for ours, theirs in zip(found, expected, strict=True):
        assert [(hit["corpus_id"], hit["cutoff_layer"]) for hit in ours] == [
            (hit["corpus_id"], hit["cutoff_layer"]) for hit in theirs
        ]


def test_a_cascade_shows_how_far_it_is(reranker, capsys):
    reranker.rank_batch(QUERIES, [DOCUMENTS] * 3, cascade={2: 0.5}, show_progress_bar=True)
    assert "60/60" in capsys.readouterr().err
    reranker.rank_batch(QUERIES, [DOCUMENTS] * 3, cascade={2: 0.5}, show_progress_bar=False)
    assert capsys.readouterr().err == ""


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 3), st.booleans()), min_size=1, max_size=25),
    st.sampled_from([0.01, 0.07, 0.3, 0.5, 1.0]),
)
def test_the_best_of_each_query_are_those_that_a_sort_finds(candidates, share):
    candidates.sort(key=lambda candidate: candidate[0])
    owner, scores, running = map(torch.tensor, zip(*candidates, strict=True))
    expected = set()
    for query in set(owner.tolist()):
        mine = [place for place, candidate in enumerate(candidates) if candidate[0] == query]
        count = math.ceil(round(share * len(mine), 9))
        expected |= set(sorted((place for place in mine if running[place]), key=lambda place: -scores[place])[:count])
    _, owner, counts = owner.unique(return_inverse=True, return_counts=True)
    kept = torch.tensor([share_of(share, count) for count in counts.tolist()])
    found = _best_of_each_query(scores.double(), scores.float(), running, owner, kept)
    assert set(found.nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("cascade", [None, {2: 0.6}])
def test_where_sigmoids_are_equal_the_scores_decide(tiny_layerwise_path, cascade):
    steep = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", normalize=True)
    with torch.no_grad():
        for head in steep.model.lm_head:
            head.linear_head.weight *= 300
    normalized = steep.rank(QUERIES[0], DOCUMENTS, cascade=cascade)
    raw = steep.rank(QUERIES[0], DOCUMENTS, cascade=cascade, normalize=False)
    assert len({hit["score"] for hit in normalized}) < len({hit["score"] for hit in raw})
    assert [hit["corpus_id"] for hit in normalized] == [hit["corpus_id"] for hit in raw]
    sigmoids = torch.tensor([hit["score"] for hit in raw]).sigmoid()
    torch.testing.assert_close(torch.tensor([hit["score"] for hit in normalized]), sigmoids, atol=1e-6, rtol=1e-3)


def test_a_batch_of_queries_without_a_cascade(reranker):
    candidates = [DOCUMENTS, DOCUMENTS[:5], []]
    for query, documents, ranked in zip(QUERIES, candidates, reranker.rank_batch(QUERIES, candidates), strict=True):
        assert [item["corpus_id"] for item in ranked] == [i["corpus_id"] for i in reranker.rank(query, documents)]


def test_layers_see_the_kept_candidates_only(reranker):
    seen = []
    (pair,) = reranker.tokenize([(QUERIES[0], "wing")])

    def note(number, layer, given, options, output):
        candidates = (given[0].shape[1] - pair.query_length) / pair.own_length
        seen.append((number, candidates, "only read" if options.get("only_last") else "run"))

    layers = enumerate(reranker.model.model.layers, start=1)
    hooks = [layer.register_forward_hook(partial(note, number), with_kwargs=True) for number, layer in layers]
    reranker.rank(QUERIES[0], ["wing"] * 20, cascade={2: 0.5, 4: 0.1}, batch_size=50)
    for hook in hooks:
        hook.remove()
    assert seen == [
        (1, 20, "run"), (2, 20, "only read"), (2, 10, "run"), (3, 10, "run"),
        (4, 10, "only read"), (4, 2, "run"), (5, 2, "run"), (6, 2, "only read"),
    ]  # fmt: skip


def test_survivors_join_scores_are_waited_for_once_a_stage_and_dropped_states_are_freed():
    stages, alive, copies = [], [], []

    class Scores(torch.Tensor):
        def cpu(self):
            copies.append(len(self))
            return self.as_subclass(torch.Tensor)

    def states(size):
        lengths = torch.tensor([[2, 0, 0], *[[0, 3, 1]] * size]).T
        packed = PackedBatch(*lengths, torch.device("cpu"), prefixes=torch.tensor([-1, *[0] * size]))
        own = torch.arange(2 + 4 * size, dtype=torch.float32)[None, :, None]
        alive.append(weakref.ref(own))
        return PackedStates(own, packed)

    def score(states, layer):
        stages.append((layer, len(states.packed.sequences), sum(one() is not None for one in alive)))
        return states.hidden[0, states.packed.indices(row_indices).last_tokens, 0].as_subclass(Scores)

    batches = [states(10) for _ in range(4)]
    scores, exits, _ = finish(run_cascade(score, batches, [[0] * 10] * 4, Setting(6, cascade={2: 0.2})))
    assert stages == [*[(2, 10, 4)] * 4, (6, 8, 0)] and copies == [40, 8]
    assert exits.tolist() == ([2] * 8 + [6] * 2) * 4
    assert scores.tolist() == [2.0 + 4 * number + 3 for number in range(10)] * 4


def test_batches_of_survivors_join_and_no_state_of_a_dropped_candidate_is_alive(reranker):
    """Counts the tokens of all states that layers returned and that are alive when a layer starts."""
    alive, tokens = {}, []

    def before(layer, given):
        tokens.append((layer.self_attn.layer_idx + 1, given[0].shape[1], sum(alive.values())))

    def after(layer, given, options, output):
        if not options["only_last"]:
            key = len(alive) + len(tokens) * 1000
            alive[key] = output[0].shape[1]
            weakref.finalize(output[0].untyped_storage(), alive.pop, key)

    layers = reranker.model.model.layers
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
    (pair,) = reranker.tokenize([(QUERIES[0], "wing")])
    reranker.rank(QUERIES[0], ["wing"] * 20, cascade={2: 0.2}, batch_size=5)
    for hook in hooks:
        hook.remove()
    batch, joined = (pair.query_length + count * pair.own_length for count in (5, 4))
    assert [(layer, row) for layer, row, _ in tokens] == [
        *[(1, batch), (2, batch)] * 4,
        *[(layer, joined) for layer in (2, 3, 4, 5, 6)],
    ]
    states = {layer: count for layer, _, count in tokens[8:]}
    assert states == {2: 0, 3: joined, 4: joined, 5: joined, 6: joined}


def test_no_documents_no_ranking(reranker):
    assert reranker.rank("wing", [], cascade={2: 0.5}) == []


@pytest.mark.parametrize(
    ("cascade", "message"),
    [
        ({1: 0.5}, r"cascade drops candidates after layer 1, but must do so at one of \[2, 3, 4, 5\]"),
        ({6: 0.5}, r"after layer 6, but must do so"),
        ({2: 0.0}, r"keeps 0.0 of all candidates after layer 2"),
        ({2: 0.5, 4: 0.6}, r"keeps 0.6 of all candidates after layer 4: .*the one before is 0.5"),
        ({2: 0.2}, r"keeps 4 of the 20 candidates of query 0, fewer than top_k=5"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(reranker, cascade, message):
    with pytest.raises(ValueError, match=message):
        reranker.rank("wing", DOCUMENTS, top_k=5, cascade=cascade)


def test_a_list_too_short_for_top_k_is_refused_before_the_first_pair(reranker, monkeypatch):
    monkeypatch.setattr(reranker._engine, "start", lambda *given: pytest.fail("a pair was computed"))
    lists = [DOCUMENTS * 50] * 3 + [DOCUMENTS[:2]]
    with pytest.raises(ValueError, match=r"keeps 1 of the 2 candidates of query 3, fewer than top_k=2"):
        reranker.rank_batch([*QUERIES, "plate"], lists, top_k=2, cascade={2: 0.5})


def test_lists_and_queries_must_match(reranker):
    with pytest.raises(ValueError, match="1 lists of candidates need a list of as many queries"):
        reranker.rank_batch(QUERIES, [DOCUMENTS])


def test_an_empty_schedule_keeps_all(reranker):
    assert Setting(6).kept(20) == 20
    assert reranker.rank("wing", DOCUMENTS, cascade={})[0]["cutoff_layer"] == 6


@pytest.mark.parametrize("width", WIDTHS)
def test_out_of_memory_takes_smaller_batches(reranker, width, monkeypatch, caplog):
    options = {"cascade": {2: 0.5, 4: 0.2}} | width
    expected = reranker.rank(QUERIES[0], DOCUMENTS, **options)
    monkeypatch.setattr(reranker._engine, "_limit", TokenLimit())
    monkeypatch.setattr(reranker.model.model, "embed", out_of_memory_above(reranker.model.model, 2))
    ranked = reranker.rank(QUERIES[0], DOCUMENTS, **options)
    assert "Out of memory" in caplog.text
    for key in ("corpus_id", "cutoff_layer"):
        assert [item[key] for item in ranked] == [item[key] for item in expected]
    close(*(torch.tensor([item["score"] for item in items]) for items in (ranked, expected)))


def test_out_of_memory_says_what_the_cascade_held(reranker, monkeypatch, caplog):
    monkeypatch.setattr(reranker._engine, "_limit", TokenLimit())
    monkeypatch.setattr(reranker.model.model, "embed", out_of_memory_above(reranker.model.model, 2))
    reranker.rank(QUERIES[0], DOCUMENTS, cascade={2: 0.5})
    assert re.search(
        r"with \d+ tokens in a batch, beside the states of \d+ tokens in the batches of its cascade; for now",
        caplog.text,
    )
    monkeypatch.setattr(reranker.model.model, "embed", out_of_memory_above(reranker.model.model, 0))
    message = r"pair \d+, of \d+ tokens, does not fit into memory alone, beside the states of \d+ tokens in the batches"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        reranker.rank(QUERIES[0], DOCUMENTS, cascade={2: 0.5})


@pytest.mark.parametrize("fusion", [None, 0.5])
def test_out_of_memory_halves_the_queries_of_a_cascade(reranker, fusion, monkeypatch, caplog):
    """The states of three queries do not fit, those of one do."""
    options = {"cascade": {2: 0.5, 4: 0.2}, "batch_size": 10}
    if fusion is not None:
        options |= {"first_stage_scores": [list(range(20)), [1.0] * 20, list(range(20, 0, -1))], "fusion": fusion}
    lists = QUERIES, [DOCUMENTS] * 3
    expected = reranker.rank_batch(*lists, **options)
    monkeypatch.setattr(reranker._engine, "_limit_of_cascades", TokenLimit())
    held = []

    def limited(score, batches, owners, *given):
        queries = {number for numbers in owners for number in numbers}
        held.append(len(queries))
        if len(queries) > 1:
            raise torch.OutOfMemoryError("no room")
        return (yield from run_cascade(score, batches, owners, *given))

    monkeypatch.setattr(engine, "run_cascade", limited)
    found = reranker.rank_batch(*lists, **options)
    assert held == [3, 1, 1, 1] and "the states of a cascade of 3 queries" in caplog.text
    for ranked, wanted in zip(found, expected, strict=True):
        for key in ("corpus_id", "cutoff_layer"):
            assert [hit[key] for hit in ranked] == [hit[key] for hit in wanted]
    held.clear()
    reranker.rank_batch(*lists, **options)  # the limit is known now
    assert held == [1, 1, 1]


def test_each_thread_has_its_own_callback_between_batches(reranker):
    heard = {"first": 0, "second": 0}

    def rank(name):
        def note():
            heard[name] += 1

        reranker.rank(QUERIES[0], DOCUMENTS, cascade={2: 0.5, 4: 0.2}, batch_size=20, between_batches=note)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, heard))
    assert heard == {"first": 3, "second": 3}
    reranker.rank(QUERIES[0], DOCUMENTS, cascade={2: 0.5})
    assert heard == {"first": 3, "second": 3}


def test_out_of_memory_on_one_pair_says_which(reranker, monkeypatch):
    monkeypatch.setattr(reranker._engine, "_limit", TokenLimit())
    monkeypatch.setattr(reranker.model.model, "embed", out_of_memory_above(reranker.model.model, 0))
    with pytest.raises(torch.OutOfMemoryError, match=r"pair 1, of \d+ tokens, does not fit"):
        reranker.rank(QUERIES[0], ["", " ".join(WORDS), "body"], cascade={2: 1.0})
