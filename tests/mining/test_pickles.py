import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Router
from transformers import PreTrainedModel

from flagembedding_matryoshka.mining import scores
from flagembedding_matryoshka.mining.pickles import refuse_pickled_modules
from flagembedding_matryoshka.mining.retrievers import BiEncoder
from flagembedding_matryoshka.mining.teachers import (
    bi_encoder_teacher,
    cross_encoder_teacher,
    flag_embedding_teacher,
    matryoshka_teacher,
)
from tests.encoders import save_bi_encoder, save_cross_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("wing lift", "lift drag"), ("wing lift", "heat"), ("a nozzle", "cone nozzle")]


def pickle_weights(path):
    """Replace the files of weights in a directory by pickles of the same tensors."""
    for safe in list(path.rglob("model.safetensors")):
        torch.save(load_file(safe), safe.with_name("pytorch_model.bin"))
        safe.unlink()


def refused(call, message, monkeypatch):
    """Check that a call raises ValueError and reads no weights before."""
    with monkeypatch.context() as patched:
        for owner, name in ((torch, "load"), (PreTrainedModel, "from_pretrained")):
            patched.setattr(owner, name, lambda *given, **options: pytest.fail("weights were read"))
        with pytest.raises(ValueError, match=message):
            call()


def bi_encoder(path, **options):
    return bi_encoder_teacher(str(path), scale=1.0, device="cpu", **options)


def cross_encoder(path, **options):
    return cross_encoder_teacher(str(path), device="cpu", **options)


def flag_embedding(path, **options):
    return flag_embedding_teacher(str(path), 4, 64, "cpu", model_class="encoder-only-base", **options)


def matryoshka(path, **options):
    return matryoshka_teacher(str(path), device="cpu", **options)


@pytest.mark.parametrize("teacher", [bi_encoder, cross_encoder, flag_embedding, matryoshka])
def test_a_teacher_reads_pickled_weights_only_if_the_caller_allows_it(request, teacher, tmp_path, monkeypatch):
    path = tmp_path / "model"
    if teacher is bi_encoder:
        save_bi_encoder(path)
    elif teacher is matryoshka:
        shutil.copytree(request.getfixturevalue("tiny_layerwise_path"), path)
    else:
        save_cross_encoder(path, labels=1)
    expected = teacher(path)(PAIRS)
    pickle_weights(path)
    message = rf"the weights of {path} are pickled \(pytorch_model.bin\), .* allow_pickle=True \(--allow_pickle\)\."
    refused(lambda: teacher(path), message, monkeypatch)
    assert teacher(path, allow_pickle=True)(PAIRS) == pytest.approx(expected)


def test_one_pickled_module_of_a_bi_encoder_is_refused_too(tmp_path, monkeypatch):
    bert = SentenceTransformer(str(save_bi_encoder(tmp_path / "bert")), device="cpu")
    SentenceTransformer(modules=[*bert, Dense(32, 8)], device="cpu").save(str(tmp_path / "dense"))
    routed = Router({"query": [*bert, Dense(32, 8)], "document": [*bert, Dense(32, 8)]}, default_route="query")
    SentenceTransformer(modules=[routed], device="cpu").save(str(tmp_path / "routed"))
    for name, folder in (("dense", "2_Dense"), ("routed", "document_2_Dense")):
        path = tmp_path / name
        expected = BiEncoder(str(path), device="cpu").passages(["wing lift"])
        (directory,) = path.rglob(folder)
        pickle_weights(directory)
        file = (directory / "pytorch_model.bin").relative_to(path)
        refused(lambda path=path: BiEncoder(str(path), device="cpu"), rf"are pickled \({file}\)", monkeypatch)
        found = BiEncoder(str(path), device="cpu", allow_pickle=True).passages(["wing lift"])
        torch.testing.assert_close(found, expected)


def test_safetensors_come_first(tmp_path):
    path = save_bi_encoder(tmp_path / "model")
    (path / "pytorch_model.bin").write_text("not read")
    assert len(BiEncoder(str(path), device="cpu").passages(["wing"])) == 1


def test_a_name_on_the_hub_is_refused_before_its_weights_are_fetched(tmp_path, hub):
    path = save_bi_encoder(tmp_path / "model")
    pickle_weights(path)
    hub.add("sentence-transformers/tiny", "main", path)
    for name, organization in (("tiny", "sentence-transformers"), ("sentence-transformers/tiny", None)):
        with pytest.raises(ValueError, match=rf"the weights of {name} are pickled \(pytorch_model.bin\)"):
            refuse_pickled_modules(name, organization)
    assert not list((tmp_path / "hub").rglob("*.bin"))
    refuse_pickled_modules("nobody/nothing")  # the library that loads it says that there is none


def test_the_option_of_the_command_is_no_condition_of_the_scores(tmp_path):
    """A partial file without the option is continued with it."""
    path = save_cross_encoder(tmp_path / "model", labels=1)
    pickle_weights(path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"query": "wing", "pos": ["wing lift"], "neg": ["heat"]}) + "\n")
    words = ["--input", str(rows), "--output", str(tmp_path / "out.jsonl"), "--backend", "cross_encoder"]
    words += ["--model", str(path), "--device", "cpu"]
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model.bin\)"):
        scores.main(words)
    scores.main([*words, "--allow_pickle"])
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [row["pos_scores"] + row["neg_scores"]] == [
        pytest.approx(cross_encoder(path, allow_pickle=True)([("wing", "wing lift"), ("wing", "heat")]))
    ]
