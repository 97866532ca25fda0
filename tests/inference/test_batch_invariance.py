"""In bfloat16, where a pair's score else depends on its neighbours in the last digits."""

import random

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker

WORDS = ("how does a wing lift what is the flow of heat per unit area", "air flows faster over the upper side")
WIDTHS = [{}, {"compress_layers": [1, 3], "compress_ratio": 2}]


def texts(count, longest, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices(" ".join(WORDS).split(), k=draw.randint(1, longest))) for _ in range(count)]


QUERIES = [query for query in texts(4, 12, 0) for _ in range(8)]
PAIRS = list(zip(QUERIES, texts(32, 150, 1), strict=True))


def load(path, dtype="bfloat16", **options):
    return MatryoshkaReranker(str(path), dtype=dtype, devices="cpu", **options)


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return load(tiny_layerwise_path, batch_invariant=True)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [pytest.param(WIDTHS[0], marks=pytest.mark.slow), WIDTHS[1]])
def test_a_score_is_the_same_bits_alone_in_any_order_and_in_batches_of_any_size(reranker, width):
    together = reranker.compute_score(PAIRS, cutoff_layers=[3, 6], **width)
    alone = [reranker.compute_score(pair, cutoff_layers=[3, 6], **width) for pair in PAIRS]
    assert [[scores[exit_][0] for scores in alone] for exit_ in range(2)] == together
    order = random.Random(2).sample(range(len(PAIRS)), len(PAIRS))
    shuffled = [PAIRS[place] for place in order]
    for options in ({}, {"batch_size": 3}, {"max_tokens_per_batch": 10_000}):
        found = reranker.compute_score(shuffled, cutoff_layers=[6], **width, **options)
        assert found == [together[1][place] for place in order]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_cascade_reads_what_is_read_at_its_exits(reranker, width):
    query, documents = PAIRS[0][0], [text for _, text in PAIRS]
    for hit in reranker.rank(query, documents, cascade={2: 0.5, 4: 0.2}, **width):
        layer = hit["cutoff_layer"]
        assert (
            hit["score"]
            == reranker.compute_score((query, documents[hit["corpus_id"]]), cutoff_layers=layer, **width)[0]
        )


def test_scores_are_those_of_the_plain_model_but_for_rounding(reranker, tiny_layerwise_path):
    plain = load(tiny_layerwise_path)
    exact = torch.tensor(
        MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu").compute_score(PAIRS)
    )
    errors = [(torch.tensor(model.compute_score(PAIRS)) - exact).abs().mean() for model in (plain, reranker)]
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("options", [{"compile": True}, {"quantization": "nf4"}, {"dtype": "float32"}])
def test_what_it_does_not_go_with_is_refused(options, tiny_layerwise_path):
    with pytest.raises(ValueError, match="batch_invariant runs in bfloat16 on a CPU, with weights that are neither"):
        load(tiny_layerwise_path, batch_invariant=True, **options)
