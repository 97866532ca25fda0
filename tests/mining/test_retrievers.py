import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

from flagembedding_matryoshka.mining import retrievers
from flagembedding_matryoshka.mining.retrievers import BiEncoder
from tests.encoders import WORDS, save_bi_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A bi-encoder with the prompts "cone" for queries and "plate" for passages."""
    return save_bi_encoder(tmp_path_factory.mktemp("bi_encoder"), prompts={"query": "cone ", "document": "plate "})


@pytest.fixture(scope="module")
def encoder(path):
    return BiEncoder(str(path), batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    return list({" ".join(draw.sample(WORDS, draw.randint(2, 10))): None for _ in range(60)})[:50]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_vectors_are_the_models_of_length_one_with_its_prompts(path, encoder, texts):
    model = SentenceTransformer(str(path), device="cpu")
    for found, prompt in ((encoder.queries(texts), "cone "), (encoder.passages(texts), "plate ")):
        expected = unit(model.encode([prompt + text for text in texts]))
        assert found.shape == (50, 32) and found.dtype == torch.float32
        torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("queries_at_once", "k"), [(1024, 50), (3, 7), (1, 99)])
def test_lists_are_those_of_a_loop(path, encoder, texts, monkeypatch, queries_at_once, k):
    monkeypatch.setattr(retrievers, "QUERIES_AT_ONCE", queries_at_once)
    model = SentenceTransformer(str(path), device="cpu")
    corpus, questions = texts[:43], texts[43:]
    passages = unit(model.encode(["plate " + text for text in corpus]))
    expected = []
    for question in questions:
        cosines = passages @ unit(model.encode("cone " + question))
        assert np.diff(np.sort(cosines)).min() > 1e-6  # no ties, of which there would be more than one order
        expected.append(np.argsort(-cosines)[:k].tolist())
    assert list(encoder.lists(corpus, questions, k)) == expected


def test_texts_are_cut_to_the_length_asked_for(path, encoder):
    pair = ["wing lift drag", "wing lift heat"]
    assert encoder.model.max_seq_length == 64
    first, second = encoder.passages(pair)
    assert not torch.allclose(first, second, atol=1e-2)
    first, second = BiEncoder(str(path), max_length=5, device="cpu").passages(pair)  # [CLS] plate wing lift [SEP]
    torch.testing.assert_close(first, second)


def test_bfloat16_without_instructions_for_it_is_warned_of(path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.warns(UserWarning, match="bfloat16 is several times slower than float32 on this processor"):
        BiEncoder(str(path), device="cpu", use_bf16=True)


def test_vectors_that_are_not_finite_are_refused(path, texts):
    encoder = BiEncoder(str(path), device="cpu")
    with torch.no_grad():
        next(encoder.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"bi_encoder\d+ gives vectors that are not finite"):
        list(encoder.lists(texts, ["wing"], 3))


def test_an_index_finds_nearly_the_same(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    vectors, queries = (normalize(torch.randn(count, 16, generator=draw), dim=-1) for count in (600, 20))
    exact = retrievers.exact_search(vectors)(queries, 10)
    best = (queries @ vectors.T).topk(10).indices.tolist()
    assert exact == best
    found = retrievers.index_search(vectors)(queries, 10)
    shared = [len(set(some) & set(all_)) for some, all_ in zip(found, exact, strict=True)]
    assert sum(shared) > 0.8 * 200 and all(len(row) == 10 for row in found)
    assert [row[0] for row in retrievers.index_search(vectors)(vectors[:50], 1)] == list(range(50))


def test_many_passages_are_searched_with_an_index(encoder, texts, monkeypatch):
    expected = list(encoder.lists(texts, texts[:5], 1))
    monkeypatch.setattr(retrievers, "EXACT_LIMIT", 49)
    monkeypatch.setattr(retrievers, "exact_search", None)
    assert list(encoder.lists(texts, texts[:5], 1)) == expected
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"more than 49 passages need an index: pip install .*\[index\]"):
        list(encoder.lists(texts, texts[:5], 1))


def test_stored_vectors_are_not_computed_again(path, encoder, texts, monkeypatch, tmp_path):
    monkeypatch.setattr(retrievers, "TEXTS_AT_ONCE", 4)
    corpus, questions = texts[:10], texts[10:16]
    expected = list(encoder.lists(corpus, questions, 3))
    encoded, limit = [], SimpleNamespace(left=9)
    encode = SentenceTransformer.encode

    def limited(self, inputs, **options):
        if len(encoded) + len(inputs) > limit.left:
            raise KeyboardInterrupt
        encoded.extend(inputs)
        return encode(self, inputs, **options)

    def run(**options):
        encoded.clear()
        return list(BiEncoder(str(path), device="cpu", stored=tmp_path / "v", **options).lists(corpus, questions, 3))

    monkeypatch.setattr(SentenceTransformer, "encode", limited)
    with pytest.raises(KeyboardInterrupt):
        run()
    (stored,) = (tmp_path / "v").glob("*.f32")
    assert encoded == corpus[:8] and stored.stat().st_size == 8 * 32 * 4
    stored.write_bytes(stored.read_bytes()[:-7])  # killed within a vector: its batch is computed again
    limit.left = 99
    assert run() == expected and encoded == [*corpus[4:], *questions]
    assert run() == expected and encoded == questions
    assert run(max_length=5) != expected and encoded == [*corpus, *questions]
    assert len(list((tmp_path / "v").glob("*.f32"))) == 2
