"""Arguments of a class as options of a command line, from its signature and its docstring."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flagembedding_matryoshka.inference.arguments import NumberOrWord


def add_options(parser: argparse.ArgumentParser, of: type, without: Collection[str], names: Mapping[str, str]) -> None:
    """An option for each argument of a class; those that are not given stay out of the namespace.

    Args:
        without: arguments that get none.
        names: further names of options, by argument.
    """
    hints = get_type_hints(of.__init__)  # type: ignore[misc]
    explained = _explanations(of)
    for name in inspect.signature(of).parameters:
        if name in without:
            continue
        leaves = list(_leaves(hints[name]))
        how: dict[str, Any] = {"nargs": "+"} if Iterable in leaves else {}
        if bool in leaves:
            how = {"action": argparse.BooleanOptionalAction}
        elif choices := [leaf for leaf in leaves if isinstance(leaf, str)]:
            how |= {"type": NumberOrWord(choices)} if float in leaves else {"choices": choices}
        else:
            how["type"] = next(kind for kind in (str, float, int) if kind in leaves)
        options = [f"--{option}" for option in (names.get(name), name) if option]
        parser.add_argument(*options, dest=name, default=argparse.SUPPRESS, help=explained[name], **how)


def given_options(of: type, options: argparse.Namespace) -> dict[str, Any]:
    """Those arguments of a class that the command line gave."""
    return {name: value for name, value in vars(options).items() if name in inspect.signature(of).parameters}


def _leaves(hint: Any) -> Iterator[Any]:
    """Types that a hint allows, the values of a `Literal`, and `Iterable` if there may be several."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for part in get_args(hint):
            yield from _leaves(part)
    elif origin is Literal:
        yield from get_args(hint)
    elif inspect.isclass(origin) and issubclass(origin, Iterable) and not issubclass(origin, Mapping):
        yield Iterable
        yield from _leaves(get_args(hint)[0])
    elif origin is None and hint is not NoneType:
        yield hint


def _explanations(of: type) -> dict[str, str]:
    """What the `Args` of a docstring say, by argument."""
    section = inspect.getdoc(of).split("\nArgs:\n")[1].split("\n\n")[0]  # type: ignore[union-attr]
    explained = {}
    for names, text in re.findall(r"^    (\w+(?:,\s+\w+)*): (.*?)(?=^    \w|\Z)", section, re.MULTILINE | re.DOTALL):
        for name in re.split(r",\s+", names):
            explained[name] = " ".join(text.split()).replace("%", "%%")
    return explained
