import json
import os
import runpy
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path

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


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_calls_itself_as_it_was_typed(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: flagembedding-matryoshka {name} ") and "--config FILE.yaml" in said


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("wing without a tab\n", "line 1: no tab separates a query from its texts"),
        ("q\t\udce4", "line 1: not UTF-8: byte 0xE4 after 'q\\t'"),
        ('{"query": "q"}\n', "line 1: a row must have either documents or passages"),
        (None, "lists.txt does not exist"),
    ],
)
def test_a_fault_of_the_input_is_one_line(text, fault, tmp_path, capsys):
    path = tmp_path / "lists.txt"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as ended:
        main(["rank", "--model", "m", "--input", str(path), "--output", str(tmp_path / "out.jsonl")])
    printed = capsys.readouterr()
    assert ended.value.code == 1 and not printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith("flagembedding-matryoshka rank: error: ") and fault in printed.err


def test_a_fault_of_the_model_is_one_line(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('["q", "p"]\n')
    with pytest.raises(SystemExit) as ended:
        main(["score", "--model", str(tmp_path / "none"), "--input", str(tmp_path / "rows.jsonl")])
    assert ended.value.code == 1 and capsys.readouterr().err.startswith("flagembedding-matryoshka score: error: ")


@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("a bug")])
def test_an_error_that_may_be_a_bug_keeps_its_traceback(error, monkeypatch):
    def failing(arguments=None):
        raise error

    monkeypatch.setattr("flagembedding_matryoshka.cli.rank.main", failing)
    with pytest.raises(type(error), match="a bug"):
        main(["rank"])


def test_an_interrupted_command_ends_with_130_and_one_line(monkeypatch, capsys):
    def interrupted(arguments=None):
        raise KeyboardInterrupt

    monkeypatch.setattr("flagembedding_matryoshka.cli.rank.main", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["rank"])
    assert ended.value.code == 130 and capsys.readouterr().err == "flagembedding-matryoshka rank: interrupted\n"


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_one_line_and_keeps_the_lines_of_json(desk, tmp_path):
    lists, written = tmp_path / "lists", tmp_path / "out"
    os.mkfifo(lists)
    words = ["--model", desk.model, "--devices", "cpu", "cpu", "--input", str(lists)]
    with (
        written.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", PACKAGE, "rank", *words],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
        ) as process,
        lists.open("w") as pipe,
    ):
        for number in range(300):  # more pairs than a first window has
            pipe.write(json.dumps({"query": "wing", "documents": ["heat"], "id": number}) + "\n")
        pipe.flush()
        while not written.stat().st_size:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "flagembedding-matryoshka rank: interrupted"
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(len(rows))) and all(row["ranking"] for row in rows)
