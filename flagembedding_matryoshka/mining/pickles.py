"""Pickled weights of models that other libraries load: they are refused before these read anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.checkpoints.describing import MODULES_FILE
from flagembedding_matryoshka.checkpoints.loading import refuse_pickled
from flagembedding_matryoshka.private import find_file

ALLOW_PICKLE = "read weights from pytorch_model.bin if there are no safetensors; a pickle can run code"
"""Help of `--allow_pickle`."""
BI_ENCODERS, CROSS_ENCODERS = "sentence-transformers", "cross-encoder"
"""Owners, on the hub, of the models that sentence-transformers finds by a name without an owner."""
ROUTER_FILE = "router_config.json"
"""File in the folder of a module of sentence-transformers that holds other modules."""


def refuse_pickled_modules(model: str, organization: str | None = None) -> None:
    """Refuse a model, of transformers or of sentence-transformers, whose weights are in pickled files alone.

    Args:
        model: a directory, or a name on the hub.
        organization: the owner, on the hub, of names without an owner; None if the library has no such default.

    Raises:
        ValueError: naming the first such file. Weights are not fetched.
    """
    places = [model]
    if organization is not None and "/" not in model and not Path(model).is_dir():
        places.insert(0, f"{organization}/{model}")
    for place in places:
        try:
            folders = list(_folders(place))
            for folder in folders:
                refuse_pickled(model, place, folder)
        except OSError:
            continue  # no such model: the library that loads it says so


def _folders(place: str) -> Iterator[str]:
    """Yield the folders of a model's modules, "" for the model's own."""
    modules = _read(place, MODULES_FILE)
    folders = [""] if modules is None else [module["path"] for module in modules]
    while folders:
        folder = folders.pop(0)
        yield folder
        router = _read(place, f"{folder}/{ROUTER_FILE}" if folder else ROUTER_FILE)
        if router is not None:
            folders += [f"{folder}/{name}" if folder else name for name in router["types"]]


def _read(place: str, name: str) -> Any:
    """Return the content of a JSON file of a model; None if it has no such file."""
    path = find_file(place, name)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
