import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from flagembedding_matryoshka import MatryoshkaReranker

TEXTS = ["heat", "air flows faster", "a wing", "how does a wing lift and lift", "the side", "lift"]


@dataclass
class Desk:
    """A directory with what a command reads and writes."""

    model: str
    source: Path
    output: Path

    def words(self, *more: str) -> list[str]:
        """The command's arguments."""
        files = ["--input", str(self.source), "--output", str(self.output)]
        return ["--model", self.model, "--dtype", "float32", "--devices", "cpu", *files, *more]

    def write(self, rows: list) -> list:
        self.source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def read(self) -> list[dict]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def desk(tiny_layerwise_path, tmp_path) -> Desk:
    return Desk(str(tiny_layerwise_path), tmp_path / "rows.jsonl", tmp_path / "out.jsonl")


@pytest.fixture(scope="session")
def reranker(tiny_layerwise_path) -> MatryoshkaReranker:
    """What the commands run, used by itself."""
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
