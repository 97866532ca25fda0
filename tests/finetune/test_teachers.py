import bm25s
import numpy as np
import pytest
import Stemmer
import torch
from sentence_transformers import SentenceTransformer

from flagembedding_matryoshka.finetune import teachers
from flagembedding_matryoshka.finetune.teachers import bi_encoder_teacher, bm25_teacher
from tests.encoders import WORDS, save_bi_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

PASSAGES = [*(f"{word} the wings of {WORDS[0]}" for word in WORDS), "lift drag lift", "nozzle"]
PAIRS = [(query, passage) for query in ("wing lift", "a nozzle?", "wing lift", "heat") for passage in PASSAGES]


@pytest.fixture(scope="module")
def bi_encoder(tmp_path_factory):
    return save_bi_encoder(tmp_path_factory.mktemp("bi_encoder"))


@pytest.fixture
def encoded(monkeypatch):
    """The texts that have been encoded, in order."""
    texts = []
    encode = SentenceTransformer.encode

    def recorded(self, inputs, **options):
        texts.extend(inputs)
        return encode(self, inputs, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", recorded)
    return texts


def test_scores_are_scaled_cosines(bi_encoder):
    model = SentenceTransformer(str(bi_encoder), device="cpu")
    queries, passages = (torch.from_numpy(model.encode(list(texts))) for texts in zip(*PAIRS, strict=True))
    expected = 20 * torch.cosine_similarity(queries, passages)
    found = bi_encoder_teacher(str(bi_encoder), scale=20, device="cpu")(PAIRS)
    assert found == pytest.approx(expected.numpy(), abs=1e-4) and len(set(found.round(3))) > 30


def test_a_text_is_encoded_once(bi_encoder, encoded):
    teach = bi_encoder_teacher(str(bi_encoder), scale=1, device="cpu")
    first, second = teach(PAIRS[:20]), teach(PAIRS)
    assert first == pytest.approx(second[:20])
    assert sorted(encoded) == sorted({query for query, _ in PAIRS} | set(PASSAGES))


def test_what_was_encoded_long_ago_is_encoded_again(bi_encoder, encoded, monkeypatch):
    monkeypatch.setattr(teachers, "FLOATS_KEPT", 2 * 32)
    teach = bi_encoder_teacher(str(bi_encoder), scale=1, device="cpu")
    scores = [teach([("wing", passage)]).item() for passage in (*PASSAGES[:3], *PASSAGES[2::-1])]
    assert encoded == ["wing", *PASSAGES[:3], PASSAGES[0]]
    assert scores[:3] == pytest.approx(scores[:2:-1])
    assert len(teach([("wing", passage) for passage in PASSAGES])) == len(PASSAGES)  # more than are kept


def test_bm25_scores_are_its_own():
    def tokenize(texts):
        stemmer = Stemmer.Stemmer("english")
        return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)

    index = bm25s.BM25()
    index.index(tokenize(PASSAGES), show_progress=False)
    expected = [0.5 * index.get_scores(tokenize([query])[0])[PASSAGES.index(passage)] for query, passage in PAIRS]
    found = bm25_teacher(PASSAGES, scale=0.5)(PAIRS)
    assert found == pytest.approx(expected) and len(set(found)) > 5


@pytest.mark.parametrize("query", ["", "the", "unheard", "the unheard"])
def test_bm25_gives_zero_where_no_word_is_shared(query):
    assert bm25_teacher(PASSAGES, scale=1)([(query, passage) for passage in PASSAGES]) == pytest.approx(
        np.zeros(len(PASSAGES))
    )
