"""The published names in FlagEmbedding's own mapping."""

import json

import pytest
from FlagEmbedding import FlagAutoReranker
from FlagEmbedding.inference.reranker.model_mapping import AUTO_RERANKER_MAPPING, RerankerConfig

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.registry import INSTEAD, PUBLISHED, register

pytestmark = pytest.mark.usefixtures("restored_mapping")


@pytest.mark.parametrize("name", ["smollm2", *PUBLISHED, *INSTEAD])
def test_flagembedding_builds_our_class(name, tiny_layerwise_path, tmp_path):
    register()
    (tmp_path / name).symlink_to(tiny_layerwise_path)

    reranker = FlagAutoReranker.from_finetuned(str(tmp_path / name), cutoff_layers=[3], devices="cpu")

    assert type(reranker) is MatryoshkaReranker
    assert reranker.cutoff_layers == [3]


def test_registering_twice_changes_nothing():
    register()
    once = AUTO_RERANKER_MAPPING.copy()
    register()
    assert once == AUTO_RERANKER_MAPPING


def test_another_class_under_a_name_is_refused_and_nothing_registered():
    class Other:
        pass

    AUTO_RERANKER_MAPPING.pop(PUBLISHED[0], None)
    AUTO_RERANKER_MAPPING[PUBLISHED[1]] = RerankerConfig(Other)
    with pytest.raises(ValueError, match=r"Other.*flagembedding_matryoshka\.inference\.reranker\.MatryoshkaReranker"):
        register()
    assert PUBLISHED[0] not in AUTO_RERANKER_MAPPING


def test_a_fine_tuned_directory_of_any_name(tiny_layerwise_path, tmp_path):
    (tmp_path / "output").symlink_to(tiny_layerwise_path)
    register("output")
    assert type(FlagAutoReranker.from_finetuned(str(tmp_path / "output"), devices="cpu")) is MatryoshkaReranker


@pytest.mark.parametrize("name", INSTEAD)
def test_flagembeddings_published_re_rankers_score_through_its_own_door(name, shared, tmp_path):
    path = shared("parity_gemma2" if "gemma2" in name else "parity_minicpm")
    golden = json.loads((path / "scores.json").read_text())
    (tmp_path / name).symlink_to(path / "layerwise_model")
    register()
    reranker = FlagAutoReranker.from_finetuned(
        str(tmp_path / name),
        use_fp16=True,  # FlagEmbedding's default, which asks for nothing on a CPU
        dtype="float32",
        devices=["cpu"],
        cutoff_layers=[4, 8],
        query_max_length=golden["query_max_length"],
        max_length=golden["max_length"],
        trust_remote_code=True,
    )
    assert type(reranker) is MatryoshkaReranker and reranker.prompt == golden["prompt"]
    scores = golden["layerwise"][0]["scores"] if "layerwise" in golden else golden["scores"]
    pairs = [tuple(pair) for pair in golden["pairs"][:3]]
    found = reranker.compute_score(pairs)
    assert reranker.compute_score_single_gpu(pairs, use_dataloader=True, num_workers=2) == found
    for layer, of_layer in zip((4, 8), found, strict=True):
        assert of_layer == pytest.approx(scores[golden["layers"].index(layer)][:3], abs=2e-5)
