"""Which backbone goes to which format."""

import re
from dataclasses import fields

import pytest
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from flagembedding_matryoshka.models.backbones import BACKBONES
from tests.checkpoints.export.test_vllm import ARCHITECTURES
from tests.exports import load, write_reranker
from tests.pages import PAGES

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA_CPP = ["qwen3"]
"""Model types whose heads llama.cpp reads."""
STOCK = {
    name: next(base for base in backbone.config_class.__mro__ if base.__module__.startswith("transformers.models."))
    for backbone in BACKBONES
    for name in backbone.config_class.made_from
}
"""Model type of a raw checkpoint, to the configuration class of transformers that it is exported with."""


def expected_row(config):
    """Cells of the columns classifier, GGUF and vLLM."""
    classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(config, None)
    if classifier is None:
        return ["no", "no", "no"]
    is_capped = any(field.name == "final_logit_softcapping" for field in fields(config))
    is_read = classifier.__name__.removesuffix("ForSequenceClassification") in ARCHITECTURES
    return [
        "yes; capped scores with `--allow_uncapped`" if is_capped else "yes",
        "yes" if config.model_type in LLAMA_CPP else "no",
        "yes" if is_read else "no",
    ]


def test_the_page_names_the_formats_of_every_backbone():
    _, _, table = PAGES["docs/export.md"].partition("| Backbone, `model_type` |")
    rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()[2:]]
    found = {name: cells for names, *cells in rows for name in re.findall(r"`(\w+)`", names)}
    assert found == {name: expected_row(config) for name, config in STOCK.items()}
    assert sum(names.count("`") for names, *_ in rows) == 2 * len(STOCK)  # no name stands twice


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({config.model_type for config in STOCK.values()} - {*LLAMA_CPP}))
def test_gguf_is_refused_for_other_backbones_by_name(name, tmp_path):
    reranker = load(write_reranker(name, tmp_path, "qwen3-reranker"))
    with pytest.raises(ValueError, match=rf"is a '{name}'|transformers has no {name} for sequence classification"):
        reranker.export(str(tmp_path / "out"), 3, format="gguf", allow_uncapped=True)
    assert not (tmp_path / "out").exists()
