"""Options of command lines, made from the signatures and docstrings of `MatryoshkaReranker`."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker

KINDS = (int, float, str)
"""Types of a value on a command line; the last one takes any text."""
ROW_ARGUMENTS = ("candidates", "first_stage_scores", "ids", "store")
"""Arguments of `MatryoshkaReranker.rank_batch` that have no option: they are read from rows, or name a store."""
Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def add_reranker(
    parser: argparse.ArgumentParser,
    names: Collection[str] | None = None,
    without: Collection[str] = (),
    more_names: Mapping[str, str] | None = None,
) -> None:
    """Add `--model` and options of `MatryoshkaReranker`.

    Args:
        names: the options to add; None adds all but `without`.
        without: options to leave out if `names` is None.
        more_names: {name: second name} of options.
    """
    group = parser.add_argument_group("the re-ranker", "as in MatryoshkaReranker")
    group.add_argument("--model", required=True, help=as_help(explanations(MatryoshkaReranker)["model_name_or_path"]))
    every = [name for name in _options(MatryoshkaReranker) if name not in without]
    add_options(group, every if names is None else names, more_names)


def add_options(parser: Parser, names: Collection[str], more_names: Mapping[str, str] | None = None) -> None:
    """Add the options `names` of `MatryoshkaReranker`, with second names as in `add_reranker`."""
    about = explanations(MatryoshkaReranker)
    for name in names:
        _add(parser, MatryoshkaReranker.__init__, name, about[name], (more_names or {}).get(name))


def given_options(options: argparse.Namespace, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return the options of `MatryoshkaReranker` that the command line gives.

    Args:
        options: the command line.
        names: the options to return; None returns all. Other options of the command may have a name of the others.
    """
    names = _options(MatryoshkaReranker) if names is None else names
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def add_ranking(parser: argparse.ArgumentParser) -> None:
    """Add the options of `MatryoshkaReranker.rank` that the constructor does not have."""
    group = parser.add_argument_group("the ranking", "as in MatryoshkaReranker.rank")
    about = explanations(MatryoshkaReranker.rank)
    for name in _ranking_options():
        _add(group, MatryoshkaReranker.rank_batch, name, about[name])


def given_ranking(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_ranking` that the command line gives."""
    return {name: getattr(options, name) for name in _ranking_options() if hasattr(options, name)}


def explanations(documented: Any) -> dict[str, str]:
    """Return the explanation of each argument in the `Args` of a docstring.

    Raises:
        ValueError: if the docstring has no `Args`.
    """
    section = re.search(r"^Args:\n((?:(?: .*)?\n)+)", f"{inspect.getdoc(documented)}\n", re.MULTILINE)
    if section is None:
        raise ValueError(f"{documented} explains no arguments.")
    found: dict[str, str] = {}
    for item in re.split(r"\n(?= {4}\S)", section[1]):
        names, about = " ".join(item.split()).split(": ", 1)
        found |= dict.fromkeys(names.split(", "), about)
    return found


def stage(text: str) -> tuple[int, float]:
    """Read a stage of a cascade, EXIT:SHARE."""
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
    """Store a cascade as {exit: share}."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if len(dict(values)) < len(values):
            parser.error(f"{option} names an exit twice: {values}")
        setattr(namespace, self.dest, dict(values))


def _ranking_options() -> list[str]:
    return [name for name in _options(MatryoshkaReranker.rank_batch) if name not in ROW_ARGUMENTS]


def _options(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is not parameter.empty]


def _add(parser: Parser, function: Callable[..., Any], name: str, about: str, other_name: str | None = None) -> None:
    """Add an option for a parameter. If the command line does not give it, the namespace lacks it."""
    default = inspect.signature(function).parameters[name].default
    hint = get_type_hints(function)[name]
    text = as_help(about if default in (None, False) else f"{about} (default: {default})")
    names = [f"--{other}" for other in (other_name, name) if other is not None]
    parser.add_argument(*names, dest=name, default=argparse.SUPPRESS, help=text, **_kind(hint))
    if {bool, str} <= set(_parts(hint)):
        parser.add_argument(
            f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=f"not --{name}"
        )


def as_help(about: str) -> str:
    """Return a docstring's explanation as argparse's help, with values as they are typed.

    An option is left out in place of None. The stages of a cascade have no braces.
    """
    about = re.sub(r"(^|[.;,]? )None is ", lambda found: f"{found[1] and '. '}Default: ", about)
    about = re.sub(r"\{(\d[\d:., ]*)\}", lambda found: found[1].replace(": ", ":").replace(", ", " "), about)
    return about.replace("%", "%%")


def _kind(hint: Any) -> dict[str, Any]:
    """Return arguments of `add_argument` for a type hint.

    Raises:
        TypeError: if a command line cannot express such a value.
    """
    parts = _parts(hint)
    if bool in parts and str in parts:
        return {"nargs": "?", "const": True, "metavar": "VALUE"}
    if bool in parts:
        return {"action": argparse.BooleanOptionalAction}
    if Mapping[int, float] in parts:
        return {"action": _Cascade, "type": stage, "nargs": "+", "metavar": "EXIT:SHARE"}
    of_lists = [item for part in parts if _is_list(part) for item in _parts(get_args(part)[0])]
    kinds = [kind for kind in KINDS if kind in (*parts, *of_lists)]
    choices = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    if not kinds and not choices:
        raise TypeError(f"a command line cannot express {hint}.")
    if choices and kinds == [float]:
        return {"type": NumberOrWord(choices), "metavar": "|".join(["NUMBER", *choices])}
    told: dict[str, Any] = {"type": kinds[-1] if kinds else type(choices[0])}
    if of_lists:
        told["nargs"] = "+"
    return told | ({"choices": choices} if choices else {})


def _parts(hint: Any) -> list[Any]:
    """Return the types in a hint, apart from None."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [part for part in parts if part is not NoneType]


def _is_list(hint: Any) -> bool:
    origin = get_origin(hint)
    return isinstance(origin, type) and (issubclass(origin, Sequence) or origin.__name__ == "Iterable")
