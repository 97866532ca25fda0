"""Parsers of command lines. `--config FILE.yaml` reads options from a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIG = "--config"


def program(module: str) -> str:
    """Return the command that was typed: the name of a script, or `python -m` with the module."""
    name = Path(sys.argv[0]).name
    return f"python -m {module}" if name in ("__main__.py", "-m") else name


class WithConfig(argparse.ArgumentParser):
    """Adds `--config` to a class of parsers: a YAML file with options by name, which the command line overrides.

    List this class first among the bases. A value of the file is what the option takes: a list for an option with
    several values, a mapping for stages of a cascade, true or false for an option without a value. Null leaves an
    option out. An option that may be repeated takes a list with an item for each time.

    Attributes:
        skips_unknown: whether to skip names in the file that are no option of the parser. Otherwise they are errors.
    """

    skips_unknown = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument(
            CONFIG,
            type=Path,
            metavar="FILE.yaml",
            default=argparse.SUPPRESS,
            help="YAML file with options by name. An option on the command line replaces that of the file",
        )

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse words, after the options of `--config`.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file is not a YAML mapping in UTF-8, or names an option that the command does not have.
        """
        words = list(sys.argv[1:] if args is None else args)
        if any(word.partition("=")[0] == CONFIG for word in words):
            finder = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
            finder.add_argument(CONFIG, type=Path, required=True)
            found, words = finder.parse_known_args(words)
            words = [*self._from_file(found.config, words), *words]
        return super().parse_known_args(words, namespace)

    def _from_file(self, path: Path, words: Sequence[str]) -> list[str]:
        """Return the options of a file as words, without those that the words of the command line have."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{CONFIG} {path} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{CONFIG} {path} must be a mapping of option names to values, got {values!r:.80}.")
        given = {word.partition("=")[0] for word in words}
        read: list[str] = []
        for name, value in values.items():
            action = self._action(name)
            if action is None and self.skips_unknown:
                continue
            if action is None or CONFIG in action.option_strings:
                raise ValueError(f"{CONFIG} {path}: {name!r} is no option of {self.prog}. See {self.prog} --help.")
            if value is not None and not given & set(action.option_strings):
                read += self._words(action, value)
        return read

    def _action(self, name: Any) -> argparse.Action | None:
        names = (name, f"--{name}")
        return next((one for one in self._actions if {one.dest, *one.option_strings} & set(names)), None)

    def _words(self, action: argparse.Action, value: Any) -> list[str]:
        """Return an option and its value as they are typed."""
        if isinstance(action, argparse._AppendAction):
            return [word for item in (value if isinstance(value, list) else [value]) for word in _typed(action, item)]
        if value is False:
            known = {option for one in self._actions for option in one.option_strings}
            negations = [f"--no-{action.dest}", f"--no_{action.dest}"]
            without_value = [] if action.nargs == 0 else [*action.option_strings[:1], "False"]
            return next(([option] for option in negations if option in known), without_value)
        return _typed(action, value)


class Parser(WithConfig):
    """A parser of one command, whose description keeps its lines."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)


def _typed(action: argparse.Action, value: Any) -> list[str]:
    option = list(action.option_strings[:1])  # empty for a positional argument
    if value is True and action.nargs in (0, "?"):
        return option
    if isinstance(value, dict):
        is_stages = action.nargs == "+"
        return [*option, *([f"{key}:{part}" for key, part in value.items()] if is_stages else [json.dumps(value)])]
    return [*option, *map(str, value if isinstance(value, list) else [value])]
