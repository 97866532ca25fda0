"""The steps of the recipe are scripts beside each other, too."""

import sys
from pathlib import Path

import pytest

from tests.shipped import write_base_package, write_fine_tuned

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "smollm2" / "recipe"))


@pytest.fixture
def base(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return write_base_package(tmp_path / "site", tiny_tokenizer)


@pytest.fixture
def checkpoint(base, tmp_path):
    """Trained on the file, whose path it notes."""
    return write_fine_tuned(str(base), tmp_path / "fine_tuned")
