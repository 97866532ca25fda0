"""FlagEmbedding's argument objects, taken for ours."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

Arguments = TypeVar("Arguments")


def adopt(ours: type[Arguments], given: Any) -> Arguments:
    """`given` as one of our argument classes: what it sets stays, what it left at its own default gets our default.

    Raises:
        ValueError: if it sets something that we have no argument for.
    """
    if isinstance(given, ours):
        return given
    names = {item.name for item in fields(ours) if item.init}  # type: ignore[arg-type]
    chosen = {}
    for item in fields(given):
        value = getattr(given, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if item.init and value != default:
            chosen[item.name] = value
    unknown = {name: value for name, value in chosen.items() if name not in names}
    if unknown:
        raise ValueError(f"{type(given).__name__} sets {unknown}, which {ours.__name__} has no use for.")
    return ours(**chosen)
