"""Training files to write."""

import json
from pathlib import Path

ROW = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [1.0], "neg_scores": [0.0, 0.5]}


def write(path: Path, *rows: dict | str) -> Path:
    """A file of these lines; a string is a line as it stands."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
