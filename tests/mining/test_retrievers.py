import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

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


@pytest.mark.parametrize(("scores_at_once", "k"), [(2**26, 50), (101, 7), (1, 99)])
def test_lists_are_those_of_a_loop(path, encoder, texts, monkeypatch, scores_at_once, k):
    monkeypatch.setattr(retrievers, "SCORES_AT_ONCE", scores_at_once)
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


def test_vectors_that_are_not_finite_are_refused(path, texts):
    encoder = BiEncoder(str(path), device="cpu")
    with torch.no_grad():
        next(encoder.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"bi_encoder\d+ gives vectors that are not finite"):
        list(encoder.lists(texts, ["wing"], 3))


def test_stored_vectors_are_not_computed_again(path, encoder, texts, monkeypatch, tmp_path):
    monkeypatch.setattr(retrievers, "TEXTS_AT_ONCE", 4)
    corpus, questions = texts[:10], texts[10:16]
    expected = list(encoder.lists(corpus, questions, 3))
    stored = tmp_path / "out.jsonl.vectors"
    encoded, limit = [], SimpleNamespace(left=0)
    encode = SentenceTransformer.encode

    def limited(self, inputs, **options):
        if len(encoded) + len(inputs) > limit.left:
            raise KeyboardInterrupt
        encoded.extend(inputs)
        return encode(self, inputs, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", limited)
    # Texts come as 4, 4, 2 passages and 4, 2 queries. A batch that was stored in part is computed again.
    for limit.left, lines, cut, again in ((9, 8, 0, corpus[:8]), (4, 10, 0, corpus[8:]), (4, 14, 9, questions[:4])):
        encoded.clear()
        with pytest.raises(KeyboardInterrupt):
            list(BiEncoder(str(path), device="cpu", stored=stored).lists(corpus, questions, 3))
        assert encoded == again and stored.read_bytes().count(b"\n") == lines
        stored.write_bytes(stored.read_bytes()[: -cut or None])
    encoded.clear()
    limit.left = 6
    assert list(BiEncoder(str(path), device="cpu", stored=stored).lists(corpus, questions, 3)) == expected
    assert encoded == questions
    with pytest.raises(ValueError, match=r"out\.jsonl\.vectors was written with other settings.* queries was"):
        list(BiEncoder(str(path), device="cpu", stored=stored).lists(corpus, questions[1:], 3))
    with pytest.raises(ValueError, match=r"max_length was None and is 5"):
        list(BiEncoder(str(path), device="cpu", stored=stored, max_length=5).lists(corpus, questions, 3))
