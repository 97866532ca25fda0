"""JSON Lines that a command appends to, and continues where it was stopped."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.files import write_text

NOT_ALWAYS = ("weights", "resolved_dtype")
"""Settings that not every run notes: no older version did, and the dtype of a cluster's workers is not known."""


class FileOutput:
    """A file, with the settings of the run beside it in `{path}.settings.json`.

    What stands behind the last line break of a file that is there, of a run that was killed while it wrote, is removed.

    Args:
        settings: all that its lines depend on beside the input, as JSON can hold it.

    Raises:
        ValueError: if the file is there and was written with other settings, or not by such a run.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        beside = settings_path(path)
        text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        if path.exists():
            if not beside.is_file():
                raise ValueError(f"{path} is there, and is not of a run that could be continued: name another file.")
            if difference := _difference(beside, json.loads(text)):
                raise ValueError(
                    f"{path} was written with other settings, those of {beside}: {difference}. Name another file, or "
                    "remove it."
                )
            self.end = _end_of_lines(path)
            os.truncate(path, self.end)
        else:
            write_text(beside, text)
            path.touch()
            self.end = 0

    def keep(self, count: int) -> None:
        """Remove all but the first `count` lines."""
        with self.path.open("rb") as file:
            self.end = sum(map(len, islice(file, count)))
        os.truncate(self.path, self.end)

    def remove(self) -> None:
        """Remove the file and its settings."""
        remove_output(self.path)

    def lines(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for line in file:
                yield line.decode(errors="replace")  # which no row has written

    def append(self, lines: Iterable[str]) -> None:
        """Raises ValueError if somebody else has written to the file meanwhile."""
        data = join_lines(lines)
        with self.path.open("ab") as file:
            if file.tell() != self.end:
                raise ValueError(f"{self.path} has been written to meanwhile: {file.tell()} bytes, not {self.end}.")
            file.write(data)
        self.end += len(data)


def settings_path(path: Path) -> Path:
    """Return where the settings of a file lie."""
    return path.with_name(f"{path.name}.settings.json")


def remove_output(path: Path) -> None:
    """Remove a file and its settings, if they are there."""
    path.unlink(missing_ok=True)
    settings_path(path).unlink(missing_ok=True)


def join_lines(lines: Iterable[str]) -> bytes:
    """Return the lines in UTF-8, each with its line break."""
    return "".join(f"{line}\n" for line in lines).encode()


def _end_of_lines(path: Path) -> int:
    """How many bytes there are up to the last line break, it included."""
    with path.open("rb") as file:
        place = file.seek(0, os.SEEK_END)
        while place > 0:
            start = max(0, place - 2**20)
            file.seek(start)
            found = file.read(place - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            place = start
    return 0


def _difference(before: Path, new: Mapping[str, Any]) -> str | None:
    """The first setting in which two runs differ; None where all are the same, however they are laid out.

    Raises:
        ValueError: if the file of those before holds no settings.
    """
    try:
        old = json.loads(before.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{before} is no JSON: {error}") from error
    if not isinstance(old, dict):
        raise ValueError(f"{before} holds no object of settings.")
    if "weights" not in old:
        warnings.warn(
            f"{before} names no weights: a version wrote it that did not note them. Whether the lines before were "
            "written with the same is not known.",
            UserWarning,
            stacklevel=4,
        )
    for name in (*old, *new):
        if name in NOT_ALWAYS and not (name in old and name in new):
            continue
        if (name in old, old.get(name)) != (name in new, new.get(name)):
            return f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
    return None
