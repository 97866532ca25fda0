"""Output files of commands that resume: lines are appended, and a later run continues after the last line."""

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
"""Settings that a run may lack, because older versions did not store them."""


class FileOutput:
    """A file of lines, with the settings of its run in `{path}.settings.json`.

    If the file exists, an incomplete last line is removed, which a run writes when it is killed.

    Args:
        path: the file.
        settings: JSON values of all conditions of the lines, apart from the input.

    Raises:
        ValueError: if the file exists and was written with other settings, or without settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        beside = settings_path(path)
        text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        if path.exists():
            if not beside.is_file():
                raise ValueError(f"{path} exists without {beside.name}, so no run can continue it: name another file.")
            if difference := _difference(beside, json.loads(text)):
                raise ValueError(
                    f"{path} was written with other settings, those of {beside}: {difference}. Name another file, or "
                    f"remove {path.name}."
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
        """Yield the lines, with their line breaks."""
        with self.path.open("rb") as file:
            for line in file:
                yield line.decode(errors="replace")  # bytes that are not UTF-8 do not come from a run

    def append(self, lines: Iterable[str]) -> None:
        """Append lines and store them on the disk. Raises ValueError if another process has changed the file."""
        data = join_lines(lines)
        with self.path.open("ab") as file:
            if file.tell() != self.end:
                raise ValueError(
                    f"{self.path} has {file.tell()} bytes instead of {self.end}: another process has written to it. "
                    "Stop that process, remove the file and call the command again."
                )
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.end += len(data)


def settings_path(path: Path) -> Path:
    """Return the path of a file's settings."""
    return path.with_name(f"{path.name}.settings.json")


def remove_output(path: Path) -> None:
    """Remove a file and its settings, if they exist."""
    path.unlink(missing_ok=True)
    settings_path(path).unlink(missing_ok=True)


def join_lines(lines: Iterable[str]) -> bytes:
    """Return the lines in UTF-8, each with its line break."""
    return "".join(f"{line}\n" for line in lines).encode()


def _end_of_lines(path: Path) -> int:
    """Return the number of bytes up to and including the last line break."""
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
    """Describe the first setting in which two runs differ; None if all are equal.

    Args:
        before: file with the settings of the earlier run.
        new: settings of this run.

    Raises:
        ValueError: if the file has no settings.
    """
    try:
        old = json.loads(before.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{before} is not JSON: {error}") from error
    if not isinstance(old, dict):
        raise ValueError(f"{before} must be a JSON object of settings.")
    if "weights" not in old:
        warnings.warn(
            f"{before} names no weights: an older version wrote it. It is not known whether the earlier lines were "
            "written with the same weights.",
            UserWarning,
            stacklevel=4,
        )
    for name in (*old, *new):
        if name in NOT_ALWAYS and not (name in old and name in new):
            continue
        if (name in old, old.get(name)) != (name in new, new.get(name)):
            return f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
    return None
