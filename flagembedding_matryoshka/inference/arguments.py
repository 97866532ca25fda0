"""The re-ranker's options on a command line, read off its signatures and docstrings: each is said in one place."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker

KINDS = (int, float, str)
"""What one word of a command line can be, the widest last."""
ROW_ARGUMENTS = ("first_stage_scores",)
"""Arguments of `MatryoshkaReranker.rank_batch` that are read from rows of the input and have no option."""
Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def add_reranker(
    parser: argparse.ArgumentParser, names: Collection[str] | None = None, without: Collection[str] = ()
) -> None:
    """Add `--model` and options of `MatryoshkaReranker`.

    Args:
        names: the options to add; None adds all but `without`.
        without: options to leave out; read only if `names` is None.
    """
    group = parser.add_argument_group("the re-ranker", "as in MatryoshkaReranker")
    about = explanations(MatryoshkaReranker)
    group.add_argument("--model", required=True, help=about["model_name_or_path"].replace("%", "%%"))
    for name in [name for name in _options(MatryoshkaReranker) if name not in without] if names is None else names:
        _add(group, MatryoshkaReranker.__init__, name, about[name])


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `MatryoshkaReranker` that were given."""
    return {name: getattr(options, name) for name in _options(MatryoshkaReranker) if hasattr(options, name)}


def add_ranking(parser: argparse.ArgumentParser) -> None:
    """The options of `MatryoshkaReranker.rank` that are not the constructor's."""
    group = parser.add_argument_group("the ranking", "as in MatryoshkaReranker.rank")
    about = explanations(MatryoshkaReranker.rank)
    for name in _ranking_options():
        _add(group, MatryoshkaReranker.rank_batch, name, about[name])


def given_ranking(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `MatryoshkaReranker.rank` that were given."""
    return {name: getattr(options, name) for name in _ranking_options() if hasattr(options, name)}


def explanations(documented: Any) -> dict[str, str]:
    """What a docstring's Args say of each."""
    section = re.search(r"^Args:\n((?:(?: .*)?\n)+)", f"{inspect.getdoc(documented)}\n", re.MULTILINE)
    if section is None:
        raise ValueError(f"{documented} explains no arguments.")
    found: dict[str, str] = {}
    for item in re.split(r"\n(?= {4}\S)", section[1]):
        names, about = " ".join(item.split()).split(": ", 1)
        found |= dict.fromkeys(names.split(", "), about)
    return found


def stage(text: str) -> tuple[int, float]:
    """EXIT:SHARE of a cascade."""
    layer, _, share = text.partition(":")
    try:
        return int(layer), float(share)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be EXIT:SHARE, such as 8:0.5") from error


class NumberOrWord:
    """A type of argparse: a float, or one of several words.

    Args:
        words: words that are accepted instead of a number.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    def __call__(self, text: str) -> float | str:
        """Return the number or the word. Raises argparse.ArgumentTypeError if the text is neither."""
        if text in self._words:
            return text
        try:
            return float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number or {' or '.join(self._words)}") from error


class _Cascade(argparse.Action):
    """{exit: share} of all stages."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if len(dict(values)) < len(values):
            parser.error(f"{option} names an exit twice: {values}")
        setattr(namespace, self.dest, dict(values))


def _ranking_options() -> list[str]:
    return [name for name in _options(MatryoshkaReranker.rank_batch) if name not in ROW_ARGUMENTS]


def _options(function: Callable[..., Any]) -> list[str]:
    """The names of the parameters that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is not parameter.empty]


def _add(parser: Parser, function: Callable[..., Any], name: str, about: str) -> None:
    """An option that is absent from what was parsed where it was not given."""
    default = inspect.signature(function).parameters[name].default
    if default not in (None, False):
        about = f"{about} (default: {default})"
    kind = _kind(get_type_hints(function)[name], default)
    parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=about.replace("%", "%%"), **kind)


def _kind(hint: Any, default: Any) -> dict[str, Any]:
    """What `add_argument` is told about a parameter.

    Raises:
        TypeError: if a command line cannot say such a value.
    """
    parts = _parts(hint)
    if default is False and str in parts:  # a flag that may also name a kind
        return {"nargs": "?", "const": True, "metavar": "KIND"}
    if bool in parts:
        return {"action": "store_true" if default is False else argparse.BooleanOptionalAction}
    if Mapping[int, float] in parts:
        return {"action": _Cascade, "type": stage, "nargs": "+", "metavar": "EXIT:SHARE"}
    of_lists = [item for part in parts if _is_list(part) for item in _parts(get_args(part)[0])]
    kinds = [kind for kind in KINDS if kind in (*parts, *of_lists)]
    choices = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    if not kinds and not choices:
        raise TypeError(f"no word of a command line is {hint}")
    if choices and kinds == [float]:
        return {"type": NumberOrWord(choices), "metavar": "|".join(["NUMBER", *choices])}
    told: dict[str, Any] = {"type": kinds[-1] if kinds else type(choices[0])}
    if of_lists:
        told["nargs"] = "+"
    return told | ({"choices": choices} if choices else {})


def _parts(hint: Any) -> list[Any]:
    """What a value may be beside None."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [part for part in parts if part is not NoneType]


def _is_list(hint: Any) -> bool:
    origin = get_origin(hint)
    return isinstance(origin, type) and (issubclass(origin, Sequence) or origin.__name__ == "Iterable")
