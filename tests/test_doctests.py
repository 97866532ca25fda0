"""The drawings in docstrings are true."""

import doctest
from importlib import import_module

import pytest

MODULES = (
    "finetune.sampling",
    "inference.scoring",
    "models.attention",
    "models.compression",
    "models.batch",
    "setting",
)


@pytest.mark.parametrize("name", MODULES)
def test_a_drawing_is_true(name):
    found = doctest.testmod(import_module(f"flagembedding_matryoshka.{name}"))
    assert found.attempted and not found.failed
