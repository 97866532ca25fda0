"""Scores and rankings with passages that run apart from their queries up to a store layer."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flagembedding_matryoshka import MatryoshkaReranker, Setting
from flagembedding_matryoshka.models.batch import pack_pairs
from flagembedding_matryoshka.text.templates import TEMPLATES
from tests.batches import close
from tests.qwen import write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["wing", "flow", "body", "heat", "shock", "plate", "speed", "layer"]
DOCUMENTS = [" ".join(WORDS[(7 * i + j) % 8] for j in range(1 + 3 * i % 11)) for i in range(12)] + [""]
QUERIES = ["what about the wing", "the flow of heat", "shock"]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
WIDTHS = [{}, {"compress_ratio": 4}, {"compress_layers": [2, 4], "compress_ratio": 2}]
EVERY_WIDTH = pytest.mark.parametrize("width", WIDTHS)


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=7)


def scores(reranker, pairs=PAIRS, **options):
    return torch.tensor(reranker.compute_score(pairs, **options))


@EVERY_WIDTH
def test_a_pair_scores_the_same_alone_in_a_batch_and_in_any_order(reranker, width):
    options = {"cutoff_layers": [6, 3], "store_layer": 2, **width}
    together = scores(reranker, **options)
    alone = torch.cat([scores(reranker, [pair], **options) for pair in PAIRS], 1)
    close(together, alone, 2e-6)
    close(scores(reranker, PAIRS[::-1], batch_size=40, **options), together.flip(1), 2e-6)
    for number, layer in enumerate([6, 3]):
        close(scores(reranker, **options | {"cutoff_layers": layer}), together[number], 2e-6)
    plain = scores(reranker, cutoff_layers=[6, 3], **{"compress_layers": 2, **width})
    assert (together - plain).abs().mean() > 1e-2


@EVERY_WIDTH
def test_without_a_store_layer_no_bit_changes(reranker, tiny_layerwise_path, width):
    width = {"compress_layers": [2], **width}
    default = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=7, store_layer=2)
    expected = scores(reranker, **width)
    assert torch.equal(scores(reranker, store_layer=0, **width), expected)
    assert torch.equal(scores(default, store_layer=0, **width), expected)
    assert torch.equal(scores(default, **width), scores(reranker, store_layer=2, **width))
    assert not torch.equal(scores(default, **width), expected)


@EVERY_WIDTH
@pytest.mark.parametrize("stages", [{3: 0.5, 5: 0.2}, {4: 0.31}])
def test_a_cascade_has_the_scores_of_passes_without_one(reranker, width, stages):
    options = {"store_layer": 2, **width}
    exits = [*stages, 6]
    of_layer = {
        layer: scores(reranker, cutoff_layers=layer, **options).view(len(QUERIES), len(DOCUMENTS)) for layer in exits
    }
    rankings = reranker.rank_batch(QUERIES, [DOCUMENTS] * len(QUERIES), cascade=stages, **options)
    for query, ranking in enumerate(rankings):
        assert {hit["cutoff_layer"] for hit in ranking} == set(exits)
        for hit in ranking:
            assert hit["score"] == pytest.approx(
                float(of_layer[hit["cutoff_layer"]][query, hit["corpus_id"]]), abs=5e-6
            )
        alive = set(range(len(DOCUMENTS)))
        for layer, share in stages.items():
            best = sorted(alive, key=lambda place: -float(of_layer[layer][query, place]))
            alive = set(best[: Setting(6, cascade={layer: share}).kept(len(DOCUMENTS))])
        assert {hit["corpus_id"] for hit in ranking if hit["cutoff_layer"] == 6} == alive


@EVERY_WIDTH
def test_a_deadline_reads_exits_above_the_store_layer(reranker, width):
    options = {"store_layer": 3, **{name: value for name, value in width.items() if name != "compress_layers"}}
    expected = reranker.rank(QUERIES[0], DOCUMENTS, **options)
    found = reranker.rank(QUERIES[0], DOCUMENTS, deadline_ms=1e9, **options)
    assert [hit["corpus_id"] for hit in found] == [hit["corpus_id"] for hit in expected]
    close(*(torch.tensor([hit["score"] for hit in hits]) for hits in (found, expected)), 5e-6)
    hurried = reranker.rank(QUERIES[0], DOCUMENTS, deadline_ms=1e-9, **options)
    assert {hit["cutoff_layer"] for hit in hurried} == {4}


@given(query=st.text(max_size=40), passage=st.text(max_size=200), template=st.sampled_from(sorted(TEMPLATES)))
@settings(max_examples=40, deadline=None)
def test_the_tokens_of_a_passage_do_not_depend_on_its_query(reranker, query, passage, template):
    """However long they are: a passage is cut to the length that fits beside the longest query."""
    own = reranker._pair_tokenizer
    words = TEMPLATES[template]
    lengths = own.lengths_within(12, 40, words, fits_all_queries=True)
    build = lambda text: own.build([(text, passage)], *lengths, words)[0]  # noqa: E731
    first, other = build(query), build("wing " * 40)
    assert first.passage_ids.tolist() == other.passage_ids.tolist()
    assert other.query_is_cut and first.passage_is_cut == other.passage_is_cut
    (cut,) = own.build([("wing " * 40, passage)], *own.lengths_within(12, 40, words), words)
    assert first.passage_ids.tolist() == cut.passage_ids.tolist()


def test_a_call_with_a_store_layer_cuts_passages_for_the_longest_query(reranker):
    pair, options = ("wing", "heat " * 100), {"query_max_length": 20, "max_length": 40}
    (plain,), (stored,) = (reranker.tokenize([pair], store_layer=layer, **options) for layer in (0, 2))
    assert plain.passage_length == 40 and stored.passage_length < 40
    close(scores(reranker, [pair], store_layer=2, **options), scores(reranker, [stored], store_layer=2), 1e-6)
    with pytest.raises(
        ValueError, match=r"query_max_length=80 leaves no room for passages that fit beside every query"
    ):
        reranker.compute_score([pair], store_layer=2, query_max_length=80, max_length=40)


def test_operations_are_those_that_torch_counts(reranker):
    width = {"store_layer": 2, "compress_ratio": 4, "batch_size": 100}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ranked = reranker.rank(QUERIES[0], DOCUMENTS, cascade={3: 0.4, 5: 0.1}, **width)
    pairs = [(QUERIES[0], DOCUMENTS[hit["corpus_id"]]) for hit in ranked]
    depths = [hit["cutoff_layer"] for hit in ranked]
    operations = reranker.estimate_flops(pairs, depths, cutoff_layers=[3, 5, 6], **width)
    assert set(depths) == {3, 5, 6} and operations == counter.get_total_flops()
    assert operations < reranker.estimate_flops(pairs, depths, cutoff_layers=[3, 5, 6], batch_size=100)


@EVERY_WIDTH
def test_a_passage_before_its_query_is_apart_from_it_too(tmp_path_factory, width):
    path = tmp_path_factory.mktemp("model") / "ctxl-rerank-v2"
    write_causal_lm(path, tie_word_embeddings=False)
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu", start_layer=2)
    options = {"cutoff_layers": [3, 6], "store_layer": 2, **width}
    alone = torch.cat([scores(reranker, [pair], **options) for pair in PAIRS], 1)
    close(scores(reranker, **options), alone, 5e-6)
    _, packed = pack_pairs(
        sorted(reranker.tokenize(PAIRS), key=lambda pair: pair.prefix.ids.tolist()), torch.device("cpu")
    )
    assert packed.shares_passages
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        reranker.compute_score(PAIRS, **options)
    assert reranker.estimate_flops(PAIRS, **options) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store_layer": 3, "cutoff_layers": [2, 6, 3]}, r"cutoff_layers \[2, 3\] do not lie above store_layer=3"),
        ({"store_layer": 6}, r"cutoff_layers \[6\] do not lie above store_layer=6"),
        ({"store_layer": 3, "cascade": {2: 0.5, 4: 0.1}}, r"cascade \[2\] do not lie above store_layer=3"),
        (
            {"store_layer": 3, "compress_layers": [2, 4], "compress_ratio": 2},
            r"compress_layers \[2\] lie below store_layer=3: stored passages are compressed after layer 3",
        ),
        ({"store_layer": -1}, r"store_layer is -1, but must be a number of layers, or 0 for none"),
    ],
)
def test_settings_that_cannot_be_stored_are_refused(reranker, options, message):
    with pytest.raises(ValueError, match=message):
        if "cutoff_layers" in options:
            reranker.compute_score(PAIRS, **options)
        reranker.rank(QUERIES[0], DOCUMENTS, **options)


@pytest.mark.parametrize("value", [2.5, True, "2", [2]])
def test_a_store_layer_is_an_int(reranker, value):
    with pytest.raises(TypeError, match=r"store_layer must be an int, got "):
        reranker.compute_score(PAIRS, store_layer=value)


def test_a_setting_says_its_store_layer():
    setting = Setting(6, (), 4, store_layer=3)
    assert setting == Setting(6, (3,), 4, store_layer=3) and setting.compresses_after(3)
    assert str(setting) == "6 layers, ratio 4 after 3, passages stored after 3"
    assert Setting(**setting.to_json()) == setting and setting.to_json()["store_layer"] == 3
    assert setting.arguments["store_layer"] == 3 and setting.readable(range(1, 9)) == [4, 5, 6]
