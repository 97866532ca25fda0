import runpy
import sys
from importlib import import_module
from importlib.metadata import entry_points, version

import pytest

from flagembedding_matryoshka.cli.main import COMMANDS, PACKAGE, main

FIRST_NAMES = ("evaluate", "evaluation", "finetune", "mine", "score", "serve")


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch):
    """The process's arguments are as before when a test ends."""
    monkeypatch.setattr(sys, "argv", ["pytest"])


def test_the_command_and_the_first_names_are_installed():
    scripts = {entry.name: entry for entry in entry_points(group="console_scripts")}
    assert scripts["flagembedding-matryoshka"].load() is main
    assert all(callable(scripts[f"flagembedding-matryoshka-{name}"].load()) for name in FIRST_NAMES)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_that_of_the_command(name, capsys):
    assert callable(import_module(f"{PACKAGE}.{COMMANDS[name][0]}").main)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert (
        ended.value.code == 0 and said.startswith("usage: ") and "usage: flagembedding-matryoshka COMMAND" not in said
    )


def test_a_command_is_called_by_its_name(capsys):
    with pytest.raises(SystemExit):
        main(["mine", "--data"])
    assert "flagembedding-matryoshka mine: error: argument --data: expected one argument" in capsys.readouterr().err


def test_help_names_all_commands_and_an_unknown_one_is_answered_with_them(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in COMMANDS)
    with pytest.raises(SystemExit):
        main(["rnak", "--model", "m"])
    said = capsys.readouterr().err
    assert all(name in said for name in ("rnak", *COMMANDS))


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == version(PACKAGE)


def test_the_package_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(PACKAGE, run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: flagembedding-matryoshka COMMAND")
