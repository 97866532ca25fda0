"""Output of a command: a file, or standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from flagembedding_matryoshka.text.lines import STANDARD_INPUT
from flagembedding_matryoshka.text.output import FileOutput, join_lines


class Output(Protocol):
    """Where a command writes its lines."""

    def lines(self) -> Iterator[str]:
        """Yield the lines of an earlier run."""
        ...

    def append(self, lines: Iterable[str]) -> None:
        """Write complete lines."""
        ...


class StandardOutput:
    """Standard output, which has no lines of an earlier run."""

    def lines(self) -> Iterator[str]:
        return iter(())

    def append(self, lines: Iterable[str]) -> None:
        """Write complete lines. If the reader has closed the pipe, end the process with exit code 1."""
        try:
            sys.stdout.buffer.write(join_lines(lines))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
            raise SystemExit(1) from None


def open_output(path: Path, settings: Mapping[str, Any]) -> Output:
    """Open a file, or standard output if `path` is `STANDARD_INPUT`."""
    return StandardOutput() if path == STANDARD_INPUT else FileOutput(path, settings)
