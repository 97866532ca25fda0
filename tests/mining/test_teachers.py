import bm25s
import numpy as np
import pytest
import Stemmer
import torch
from sentence_transformers import SentenceTransformer

from flagembedding_matryoshka.inference import reranker
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.mining import teachers
from flagembedding_matryoshka.mining.teachers import (
    bi_encoder_teacher,
    bm25_teacher,
    cross_encoder_teacher,
    matryoshka_teacher,
)
from tests.encoders import WORDS, save_bi_encoder, save_cross_encoder
from tests.finetune.runs import runner
from tests.shipped import needs_smollm2

pytestmark = pytest.mark.usefixtures("one_thread")

PASSAGES = [*(f"{word} the wings of {WORDS[0]}" for word in WORDS), "lift drag lift", "nozzle"]
PAIRS = [(query, passage) for query in ("wing lift", "a nozzle?", "wing lift", "heat") for passage in PASSAGES]


@pytest.fixture(scope="module")
def bi_encoder(tmp_path_factory):
    return save_bi_encoder(tmp_path_factory.mktemp("bi_encoder"))


@pytest.fixture
def encoded(monkeypatch):
    """The encoded texts, in order."""
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


@pytest.fixture(scope="module")
def student_path(tiny_raw_model_path, training_file, tmp_path_factory):
    """An output directory of fine-tuning: adapters for a raw model."""
    output_dir = tmp_path_factory.mktemp("student") / "output"
    runner(tiny_raw_model_path, training_file, output_dir, {"start_layer": 2}).run()
    return str(output_dir)


WIDTHS = [
    {},
    {"cutoff_layers": 3},
    {"cutoff_layers": 5, "compress_layers": [2, 4], "compress_ratio": 2},
    {"max_length": 24},
    {"max_length": 40, "query_max_length": 4},
]


@pytest.mark.parametrize("options", WIDTHS, ids=str)
def test_a_student_teaches_its_own_scores(student_path, options):
    expected = MatryoshkaReranker(student_path, dtype="float32", devices="cpu").compute_score(PAIRS, **options)
    found = cross_encoder_teacher(student_path, device="cpu", batch_size=7, scale=2.0, **options)(PAIRS)
    assert found == pytest.approx(2 * np.array(expected), abs=1e-5) and np.std(expected) > 0.01


def test_a_raw_model_teaches_by_its_name_alone(tiny_raw_model_path):
    expected = MatryoshkaReranker(tiny_raw_model_path, dtype="bfloat16", devices="cpu").compute_score(PAIRS)
    found = matryoshka_teacher(tiny_raw_model_path, device="cpu", use_bf16=True)(PAIRS)
    assert found == pytest.approx(expected, abs=0.02)


def test_a_student_teaches_in_bfloat16(student_path):
    expected = MatryoshkaReranker(student_path, dtype="bfloat16", devices="cpu").compute_score(PAIRS)
    found = cross_encoder_teacher(student_path, device="cpu", use_bf16=True)(PAIRS)
    full = cross_encoder_teacher(student_path, device="cpu")(PAIRS)
    assert found == pytest.approx(expected, abs=0.02) and 1e-4 < np.abs(found - full).max() < 0.2


def test_settings_that_do_not_exist_are_refused_before_weights_are_read(student_path, tmp_path, monkeypatch):
    monkeypatch.setattr(reranker, "load_model", None)
    with pytest.raises(ValueError, match="cutoff_layers"):
        matryoshka_teacher(student_path, cutoff_layers=9)
    with pytest.raises(ValueError, match="compress_ratio"):
        cross_encoder_teacher(student_path, compress_layers=[2], compress_ratio=3)
    encoder = str(save_cross_encoder(tmp_path / "encoder", labels=1))
    with pytest.raises(ValueError, match=r"encoder is not a layer-wise checkpoint.* leave out \{'cutoff_layers': 3\}"):
        cross_encoder_teacher(encoder, cutoff_layers=3, compress_ratio=1, compress_layers=None)


@needs_smollm2
@pytest.mark.slow
def test_the_shipped_reranker_teaches():
    expected = MatryoshkaReranker("smollm2", dtype="float32", devices="cpu").compute_score(PAIRS[:5])
    assert matryoshka_teacher("smollm2", device="cpu")(PAIRS[:5]) == pytest.approx(expected, abs=1e-4)
