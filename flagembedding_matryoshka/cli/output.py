"""Output of a command: a file, or standard output."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from flagembedding_matryoshka.text.lines import STANDARD_INPUT
from flagembedding_matryoshka.text.output import FileOutput, join_lines


class Output(Protocol):
    """The destination of a command's lines."""

    def lines(self) -> Iterator[str]:
        """Yield the lines of an earlier run."""
        ...

    def append(self, lines: Iterable[str]) -> None:
        """Write complete lines."""
        ...


class StandardOutput:
    """Standard output, which has no lines of an earlier run.

    Args:
        stream: the process's standard output. `sys.stdout` may be another stream during the computation.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def lines(self) -> Iterator[str]:
        return iter(())

    def append(self, lines: Iterable[str]) -> None:
        """Write complete lines. If the reader has closed the pipe, end the process with exit code 1."""
        try:
            self.stream.buffer.write(join_lines(lines))
            self.stream.buffer.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # Python flushes it once more at the end
            raise SystemExit(1) from None


def open_output(path: Path, settings: Mapping[str, Any], standard_output: TextIO) -> Output:
    """Open a file, or standard output if `path` is `STANDARD_INPUT`."""
    return StandardOutput(standard_output) if path == STANDARD_INPUT else FileOutput(path, settings)
