"""Files that are written completely or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which becomes `path` when the context is left. A missing directory is made.

    The path is in a directory of its own beside `path`, so that threads and processes may write the same file.

    Raises:
        IsADirectoryError: if `path` is a directory.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
        partial = Path(directory, path.name)
        yield partial
        partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, completely or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
