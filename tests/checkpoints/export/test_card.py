"""The model card beside an exported exit."""

import re

import pytest
import yaml

from flagembedding_matryoshka.checkpoints.export.card import USES, card, is_own_card


@pytest.mark.parametrize("format", USES)
def test_a_card_reads_alone(format):
    text = card("/somewhere/model/", 9, 18, "sigmoid", format, has_instruction=True, file="model-f16.gguf")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-ranking"
    assert "# model, layers 1 to 9" in body and f"export --format {format}" in body
    # A card is read on a hub, where nothing lies beside it that a relative link could lead to.
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", body))
    assert "/somewhere" not in text
    assert ("model-f16.gguf" in text) == (format == "gguf")
    assert is_own_card(text) and not is_own_card("# mine")
