"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` once it is complete; its directory is made where it is missing.

    Raises:
        IsADirectoryError: if `path` is one.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, all of it or nothing."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
