"""A checkpoint that is written replaces the one that was there."""

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.export import WRITTEN, remove_written
from flagembedding_matryoshka.cross_encoder import load_cross_encoder
from flagembedding_matryoshka.inference.plan import PLAN_NAME
from tests.leftovers import KINDS, OWN, files, leave

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("how does a wing lift", "air flows over the upper side"), ("heat", "a wing")]


def export(model, directory):
    MatryoshkaReranker(str(model), dtype="float32", devices="cpu").export(str(directory), cutoff_layers=[2, 3, 4, 5, 6])


def save(model, directory):
    load_cross_encoder(model, device="cpu").save_pretrained(str(directory), create_model_card=False)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("write", [export, save])
def test_nothing_of_an_earlier_run_is_left(write, kind, tiny_layerwise_path, tiny_raw_model_path, tmp_path):
    write(tiny_layerwise_path, tmp_path / "fresh")
    used = leave(tmp_path / "used", tiny_layerwise_path, tiny_raw_model_path, [kind])
    write(tiny_layerwise_path, used)
    assert files(used) == files(tmp_path / "fresh") | set(OWN)
    assert all((used / name).read_text() in ("mine", "{}") for name in OWN)
    scores = [
        MatryoshkaReranker(str(path), dtype="float32", devices="cpu").compute_score(PAIRS)
        for path in (used, tmp_path / "fresh")
    ]
    assert scores[0] == scores[1]
    with pytest.raises(FileNotFoundError, match="has no matryoshka_plan"):
        MatryoshkaReranker(str(used), devices="cpu", budget=1.0)


def test_a_model_replaces_itself(tiny_layerwise_path, tmp_path):
    export(tiny_layerwise_path, tmp_path / "out")
    reranker = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    expected = reranker.compute_score(PAIRS, cutoff_layers=4)
    reranker.export(str(tmp_path / "out"), cutoff_layers=[4])
    again = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    assert (again.compute_score(PAIRS), again.config.exit_layers) == (expected, [4])


def test_where_nothing_can_be_written_nothing_is_removed(tiny_layerwise_path, tiny_raw_model_path, tmp_path):
    used = leave(tmp_path / "used", tiny_layerwise_path, tiny_raw_model_path)
    before = files(used)
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
    with pytest.raises(ValueError, match=r"cutoff_layers \[9\] have no head"):
        reranker.export(str(used), cutoff_layers=[9])
    assert files(used) == before


def test_the_list_has_all_that_is_written_and_a_directory_that_is_not_there_is_none(tiny_layerwise_path, tmp_path):
    assert PLAN_NAME in WRITTEN
    remove_written(tmp_path / "missing")
    for write in (export, save):
        write(tiny_layerwise_path, tmp_path / write.__name__)
        remove_written(tmp_path / write.__name__)
        assert files(tmp_path / write.__name__) == set()
