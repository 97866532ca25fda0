"""Long documents in chunks."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference import chunking, scoring
from flagembedding_matryoshka.inference.chunking import Chunking
from flagembedding_matryoshka.inference.options import Call, resolve_call
from flagembedding_matryoshka.text.encoding import whole_characters

pytestmark = pytest.mark.usefixtures("one_thread")
QUERY = "how does a wing lift"
WORDS = ["wing", "flow", "air", "123", "größe", "翼", "😀", "\n", "  ", "\ud83d\ude00", "\ud800", "side of a wing."]
texts = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join) | st.text("ab 翼😀\ud83d\ude00\n", max_size=60)
LONG = " ".join(f"wing {number} flows" for number in range(60))
DOCUMENTS = ["air flows", LONG, "", "1234567890" * 20, "heat", LONG[::-1]]
LENGTHS = {"max_length": 40, "query_max_length": 20}


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", **LENGTHS)


def chunks_of(reranker, query, documents, most=None, overlap=0, **overrides):
    call = Call(reranker._pair_tokenizer, *resolve_call(reranker, overrides))
    return Chunking(call, most, overlap).cut(query, documents)


@given(st.lists(texts, max_size=3), st.integers(0, 3), st.sampled_from(["{}{}", "{} {}</passage>"]))
def test_chunks_are_texts_that_fit_and_cover_the_document(reranker, documents, overlap, form):
    words = {"passage_instruction_format": form, "max_length": 24 if form == "{}{}" else 40}
    for document, cut in zip(documents, chunks_of(reranker, "a", documents, None, overlap, **words), strict=True):
        assert (cut.chunks[0].start, document[cut.chunks[-1].end :].strip()) == (0, "")
        for chunk, following in zip(cut.chunks, cut.chunks[1:], strict=False):
            assert chunk.start < following.start and chunk.end < following.end
            assert not document[chunk.end : following.start].strip()
        for start, end, pair in cut.chunks:
            part = whole_characters(document[start:end])
            assert [pair] == reranker.tokenize([("a", part)], **words) and not pair.is_cut
            assert part in whole_characters(document)
        assert not cut.is_truncated
        (whole,) = reranker.tokenize([("a", document)], **words)
        assert whole.is_cut or len(cut.chunks) == 1


@given(st.text("0123456789", min_size=60, max_size=200), st.integers(0, 8))
def test_chunks_are_full_and_have_as_many_tokens_in_common_as_is_said(reranker, document, overlap):
    """Here each character is a token."""
    (cut,) = chunks_of(reranker, QUERY, [document], None, overlap)
    (first, *_, last) = cut.chunks
    (whole,) = reranker.tokenize([(QUERY, document)])
    assert whole.passage_is_cut and first.pair == replace(whole, passage_is_cut=False)
    assert all(chunk.end - chunk.start == first.end for chunk in cut.chunks if chunk is not last)
    assert all(a.end - b.start == overlap for a, b in zip(cut.chunks, cut.chunks[1:], strict=False))


@given(st.text("ab 翼😀", min_size=30, max_size=90))
def test_how_far_is_looked_ahead_changes_no_cover(reranker, document):
    assume(document.strip())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "MARGIN", 0)
        patch.setattr(chunking, "CHARACTERS", 1)
        (cut,) = chunks_of(reranker, "a", [document], max_length=24)
    ends = [0, *(chunk.end for chunk in cut.chunks)]
    gaps = [document[end : chunk.start] for end, chunk in zip(ends, cut.chunks, strict=False)]
    assert not "".join([*gaps, document[ends[-1] :]]).strip() and not cut.is_truncated


@pytest.mark.parametrize("options", [{}, {"max_chunks_per_doc": 2}, {"overlap": 5, "normalize": True}])
def test_a_document_scores_as_its_best_chunk(reranker, options):
    of_scores = {name: value for name, value in options.items() if name == "normalize"}
    ranking = reranker.rank(QUERY, DOCUMENTS, chunk=True, return_documents=True, **options)
    assert [hit["score"] for hit in ranking] == sorted((hit["score"] for hit in ranking), reverse=True)
    cuts = chunks_of(reranker, QUERY, DOCUMENTS, options.get("max_chunks_per_doc"), options.get("overlap", 0))
    for hit in ranking:
        document, cut = DOCUMENTS[hit["corpus_id"]], cuts[hit["corpus_id"]]
        parts = [document[chunk.start : chunk.end] for chunk in cut.chunks]
        assert len(parts) <= options.get("max_chunks_per_doc", len(parts))
        scores = reranker.compute_score([(QUERY, part) for part in parts], **of_scores)
        assert hit["score"] == pytest.approx(max(scores), abs=1e-5)
        best = cut.chunks[scores.index(max(scores))]
        assert hit["chunk"] == {"start": best.start, "end": best.end}
        assert hit["text"] == document
        assert ("is_truncated" in hit) == (cut.chunks[-1].end < len(document.rstrip()))
    assert max(len(cut.chunks) for cut in cuts) > 1


def test_documents_of_one_chunk_score_as_without(reranker):
    documents = [document for document in DOCUMENTS if len(document) < 20]
    for options in ({}, {"cascade": {2: 0.5}}, {"top_k": 1}):
        found = reranker.rank(QUERY, documents, chunk=True, overlap=2, **options)
        whole = [hit["corpus_id"] for hit in found]
        assert [hit.pop("chunk") for hit in found] == [{"start": 0, "end": len(documents[place])} for place in whole]
        assert found == reranker.rank(QUERY, documents, **options)


@pytest.mark.parametrize("options", [{}, {"cascade": {2: 0.5, 4: 0.2}, "top_k": 4}, {"top_k": 2, "overlap": 4}])
def test_chunks_rank_the_same_one_by_one_together_and_in_windows(reranker, options, monkeypatch):
    queries, lists = [QUERY, "heat", "flow of air"], [DOCUMENTS, [], DOCUMENTS[1:4]]
    expected = [reranker.rank(q, documents, chunk=True, **options) for q, documents in zip(queries, lists, strict=True)]
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_AHEAD", 4)
    for found in (
        reranker.rank_batch(queries, lists, chunk=True, **options),
        list(reranker.rank_iter(zip(queries, lists, strict=True), chunk=True, batch_size=3, **options)),
    ):
        for ours, theirs in zip(found, expected, strict=True):
            assert [hit.pop("score") for hit in ours] == pytest.approx([hit["score"] for hit in theirs], abs=1e-5)
            assert ours == [{name: value for name, value in hit.items() if name != "score"} for hit in theirs]


def test_in_a_cascade_shares_are_of_all_chunks(reranker):
    cuts = chunks_of(reranker, QUERY, DOCUMENTS)
    parts = [DOCUMENTS[n][chunk.start : chunk.end] for n, cut in enumerate(cuts) for chunk in cut.chunks]
    owner = [n for n, cut in enumerate(cuts) for _ in cut.chunks]
    candidates = reranker.rank(QUERY, parts, cascade={3: 0.3})
    best = {}
    for hit in candidates:
        best.setdefault(owner[hit["corpus_id"]], (hit["cutoff_layer"], pytest.approx(hit["score"], abs=1e-5)))
    ranking = reranker.rank(QUERY, DOCUMENTS, chunk=True, cascade={3: 0.3})
    assert [(hit["corpus_id"], (hit["cutoff_layer"], hit["score"])) for hit in ranking] == list(best.items())
    with pytest.raises(ValueError, match=f"of the {len(parts)} candidates of query 0"):
        reranker.rank(QUERY, DOCUMENTS, top_k=5, chunk=True, cascade={3: 0.01})


def test_what_was_cut_says_so_and_nothing_else_does(reranker):
    for documents in (DOCUMENTS, DOCUMENTS[:1]):
        pairs = reranker.tokenize([(QUERY, document) for document in documents])
        for options in ({}, {"cascade": {2: 0.5}}):
            ranking = reranker.rank(QUERY, documents, **options)
            assert {hit["corpus_id"]: hit.get("is_truncated", False) for hit in ranking} == {
                place: pair.is_cut for place, pair in enumerate(pairs)
            }
            assert all(hit.get("is_truncated", True) for hit in ranking)
    assert all(hit["is_truncated"] for hit in reranker.rank("wing " * 40, ["air", LONG], chunk=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk": True, "max_chunks_per_doc": 0}, ValueError, "max_chunks_per_doc is 0, but must be at least 1"),
        ({"chunk": True, "overlap": -1}, ValueError, "overlap is -1, but must be at least 0"),
        ({"chunk": True, "overlap": 1.5}, TypeError, "overlap must be an int, got 1.5"),
        ({"overlap": 3}, ValueError, "max_chunks_per_doc=None and overlap=3 need chunk=True"),
        ({"max_chunks_per_doc": 3}, ValueError, "max_chunks_per_doc=3 and overlap=0 need chunk=True"),
    ],
)
def test_what_no_chunk_can_be_is_refused_at_once(reranker, options, error, message):
    with pytest.raises(error, match=message):
        reranker.rank_iter([], **options)


def test_an_overlap_of_more_than_half_a_chunk_is_refused(reranker):
    with pytest.raises(ValueError, match="overlap is 30, but must be at most half of the"):
        reranker.rank(QUERY, DOCUMENTS, chunk=True, overlap=30)
