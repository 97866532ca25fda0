"""Documents that come before their queries: shared by queries, and compressed, as when each pair is alone."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.models.batch import PackedBatch, apart_indices, pack_pairs
from tests.batches import close
from tests.qwen import write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")
QUERIES = ["how does a wing lift?", "what is heat", "who flew first and where did that happen?"]
DOCUMENTS = ["air flows faster over the upper side of a wing.", "heat " * 12, "", "a wing in the air of 1903\n"]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
WIDTHS = [{}, {"compress_layers": [2], "compress_ratio": 2}, {"compress_layers": [1, 3], "compress_ratio": 4}]
EVERY_WIDTH = pytest.mark.parametrize("width", WIDTHS)


@pytest.fixture(scope="module", params=["attention", "equal"])
def reranker(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "ctxl-rerank-v2"
    write_causal_lm(path, tie_word_embeddings=False)
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu", start_layer=2)
    reranker.config.compress_weights = reranker.model.config.compress_weights = request.param
    return reranker


def alone(reranker, **width):
    rows = [reranker.compute_score([pair], cutoff_layers=[3, 6], **width) for pair in PAIRS]
    return torch.tensor(rows)[..., 0].T


@EVERY_WIDTH
def test_pairs_that_share_a_document_score_as_alone(reranker, width):
    close(torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=[3, 6], **width)), alone(reranker, **width), 1e-5)


@EVERY_WIDTH
def test_queries_rank_common_documents_as_each_alone(reranker, width):
    batch = reranker.rank_batch(QUERIES, [DOCUMENTS] * 3, **width)
    cascades = reranker.rank_batch(QUERIES, [DOCUMENTS] * 3, cascade={3: 0.5}, **width)
    for query, ranking, cascade in zip(QUERIES, batch, cascades, strict=True):
        single = reranker.rank(query, DOCUMENTS, **width)
        assert [hit["corpus_id"] for hit in ranking] == [hit["corpus_id"] for hit in single]
        close(torch.tensor([hit["score"] for hit in ranking]), torch.tensor([hit["score"] for hit in single]), 1e-5)
        scores = {hit["corpus_id"]: hit["score"] for hit in single}
        deep = [hit for hit in cascade if hit["cutoff_layer"] == 6]
        assert len(deep) == 2
        close(
            torch.tensor([hit["score"] for hit in deep]), torch.tensor([scores[hit["corpus_id"]] for hit in deep]), 1e-5
        )


def test_queries_of_a_document_share_it(reranker):
    pairs = sorted(reranker.tokenize(PAIRS), key=lambda pair: pair.prefix.ids.tolist())
    _, packed = pack_pairs(pairs, torch.device("cpu"))
    assert packed.shares_passages and len(packed.segments) == len(PAIRS) + len(DOCUMENTS)
    assert sum(packed.lengths) < 0.6 * sum(map(len, pairs))
    separate, (tokens,) = packed.apart, packed.indices(apart_indices)
    assert separate.prefixes is None and len(tokens) == sum(map(len, pairs))
    for name in ("query", "passage", "prompt"):
        expected = [getattr(pair, f"{name}_length") for pair in pairs]
        assert getattr(separate, f"{name}_lengths").tolist() == expected


def test_apart_is_the_row_of_whole_sequences():
    #        q q p p p | x | x x | q p x (shared by none)
    parts = torch.tensor([[2, 0, 0, 1], [3, 0, 0, 1], [0, 1, 2, 1]])
    packed = PackedBatch(*parts, torch.device("cpu"), prefixes=torch.tensor([-1, 0, 0, -1]))
    separate, (tokens,) = packed.apart, packed.indices(apart_indices)
    assert tokens.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert separate.passage_lengths.tolist() == [3, 3, 1] and separate.cu_seqlens.tolist() == [0, 6, 13, 16]


@EVERY_WIDTH
def test_operations_are_those_that_torch_counts(reranker, width):
    request = {"cutoff_layers": [2, 5], **width}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        reranker.compute_score(PAIRS, **request)
    assert counter.get_total_flops() == reranker.estimate_flops(PAIRS, **request)


def test_compression_merges_the_document_alone(reranker):
    lengths = reranker.tokenize(PAIRS)
    assert all(pair.passage_first and pair.passage_length for pair in lengths)
    wide, narrow = (alone(reranker, **width) for width in WIDTHS[:2])
    assert (wide - narrow).abs().max() > 1e-3


def test_a_long_document_is_cut_and_its_query_stays(reranker):
    (pair,) = reranker.tokenize([("what is heat", "heat " * 500)], max_length=60)
    text = reranker.tokenizer.decode(pair.input_ids)
    assert pair.is_cut and text.endswith("<Query> what is heat ??") and text.count("heat") < 100


def test_chunks_of_a_document(reranker):
    text = "heat is what flows. " * 40 + "a wing lifts in the air. " * 10
    (hit,) = reranker.rank("how does a wing lift?", [text], chunk=True, max_length=90)
    start, end = hit["chunk"]["start"], hit["chunk"]["end"]
    score = reranker.compute_score([("how does a wing lift?", text[start:end])], max_length=90)
    assert hit["score"] == pytest.approx(score[0], abs=1e-5)
