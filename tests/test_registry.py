"""The published names in FlagEmbedding's own mapping."""

import pytest
from FlagEmbedding import FlagAutoReranker
from FlagEmbedding.inference.reranker.model_mapping import AUTO_RERANKER_MAPPING, RerankerConfig

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.registry import PUBLISHED, register

pytestmark = pytest.mark.usefixtures("restored_mapping")


@pytest.mark.parametrize("name", ["smollm2", *PUBLISHED])
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
