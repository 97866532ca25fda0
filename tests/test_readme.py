import re
from importlib import import_module
from pathlib import Path

import pytest

from flagembedding_matryoshka.cli.main import COMMANDS, PACKAGE
from tests.shipped import needs_smollm2

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_blocks_to_run():
    assert PYTHON_BLOCKS


@needs_smollm2
@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_command_lines_name_arguments_that_exist(capsys):
    from flagembedding_matryoshka.finetune.__main__ import build_parser

    known = {option for action in build_parser()._actions for option in action.option_strings}
    launcher = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
    for command in re.findall(r"torchrun(?:.*\\\n)*.*", README):
        assert set(re.findall(r"--\w+", command)) <= known | launcher, command


def test_the_evaluation_command_parses():
    from flagembedding_matryoshka.evaluation.__main__ import build_parser

    (command,) = re.findall(r"-m flagembedding_matryoshka\.evaluation((?: .*\\\n)*.*)", README)
    assert build_parser().parse_args(command.replace("\\\n", " ").split()).write_plan


@pytest.mark.parametrize("line", re.findall(r"^flagembedding-matryoshka (.+)$", README, re.MULTILINE))
def test_the_commands_parse(line):
    name, *words = line.split()
    parser = import_module(f"{PACKAGE}.{COMMANDS[name][0]}").build_parser()
    assert parser.parse_args(words).model == "smollm2"


def test_all_commands_are_named():
    assert all(f"`{name}`" in README for name in COMMANDS)


def test_links_and_figures_are_there():
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        is_there = target in anchors or (Path(__file__).parents[1] / target).exists()
        assert target.startswith("https://") or is_there, target
