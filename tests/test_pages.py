import argparse
import re
import shlex
import shutil
import sys
from configparser import ConfigParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import flagembedding_matryoshka
from flagembedding_matryoshka.cli.main import COMMANDS, PACKAGE
from tests.pages import PAGES, ROOT, commands, snippets
from tests.shipped import needs_smollm2

README = PAGES["README.md"]
ELASTIC = "docs/elastic.md"  # its block needs what its commands write: test_elastic.py
SNIPPETS = [
    pytest.param(page, *snippet, id=f"{page} {number}")
    for page in PAGES
    if page != ELASTIC
    for number, snippet in enumerate(snippets(page), start=1)
]
NUMBER = r"-?\d+\.\d+(?:e-?\d+)?"
IN_SENTENCES = r"`((?:python -m|flagembedding-matryoshka|make|pip install|torchrun) [^`]+)`"
COMMAND_LINES = [
    (page, line) for page, text in PAGES.items() for line in (*commands(page), *re.findall(IN_SENTENCES, text))
]
LAUNCHER = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


class ParserMade(Exception):
    """Raised in the place of parsing, with the parser."""


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) > 5 and len(COMMAND_LINES) > 20
    assert sum(bool(output) for *_, output in (snippet.values for snippet in SNIPPETS)) > 5


def check_output(printed, shown):
    """Words and whole numbers are the same, other numbers nearly."""
    assert re.split(NUMBER, printed) == re.split(NUMBER, shown)
    numbers = [[float(number) for number in re.findall(NUMBER, text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02)


@needs_smollm2
@pytest.mark.parametrize(("page", "code", "output"), SNIPPETS)
def test_a_snippet_prints_the_output_below_it(page, code, output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    if output:
        check_output(capsys.readouterr().out, output)


def parser_of(module, monkeypatch):
    """The parser of a module: what its `build_parser` returns, or the first one that its `main` uses."""
    if hasattr(module, "build_parser"):
        return module.build_parser()

    def stop(parser, *_, **__):
        raise ParserMade(parser)

    with monkeypatch.context() as patched, pytest.raises(ParserMade) as made:
        patched.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        module.main()
    return made.value.args[0]


def options_of(parser):
    """Their names, those of sub-commands among them."""
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found.update(*map(options_of, action.choices.values()))
    return found


def check_arguments(module, words, monkeypatch):
    """They have names that the module knows, and are whole and right where none is left out."""
    if find_spec(module).submodule_search_locations is not None:
        module = f"{module}.__main__"
    parser = parser_of(import_module(module), monkeypatch)
    assert {word for word in words if word.startswith("--") and word != "--"} <= options_of(parser)
    if words and not {"…", "--help", "--config"} & set(words):  # a file may have the arguments that are missing
        parser.parse_args([word for word in words if word != "--"])


def check_command(words, monkeypatch):
    name, *rest = words
    if re.fullmatch(r"[A-Z_]+=.*", name):  # a variable of the environment
        return check_command(rest, monkeypatch)
    if name == "opentelemetry-instrument":
        assert (Path(sys.executable).parent / name).is_file()
        return check_command(rest, monkeypatch)
    match name.rpartition("/")[2], rest:
        case "make", [*targets]:
            assert set(targets) <= TARGETS
        case "pip", ["install", *wanted]:
            setup = ConfigParser()
            setup.read(ROOT / "setup.cfg", encoding="utf-8")
            for extra in re.findall(PACKAGE + r"\S*\[(\w+)\]", " ".join(wanted)):
                assert extra in setup["options.extras_require"]
        case "flagembedding-matryoshka", ["finetune", "check", *arguments]:
            check_arguments(f"{PACKAGE}.finetune.check", arguments, monkeypatch)
        case "flagembedding-matryoshka", [command, *arguments]:
            check_arguments(f"{PACKAGE}.{COMMANDS[command][0]}".removesuffix(".__main__"), arguments, monkeypatch)
        case "python", ["-m", module, *arguments] if module.startswith((PACKAGE, "benchmarks")):
            check_arguments(module, arguments, monkeypatch)
        case "python", ["-m", module, *_]:
            assert find_spec(module)
        case "python", [script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file()
        case "torchrun", _:
            start = rest.index("-m") + 2 if "-m" in rest else 0
            launcher = rest[:start] if start else [word for word in rest if word in LAUNCHER]
            assert {word for word in launcher if word.startswith("--")} <= LAUNCHER
            arguments = rest[start:] if start else [word for word in rest if word not in LAUNCHER]
            check_arguments(f"{PACKAGE}.finetune", ["…", *arguments], monkeypatch)
        case "docker", ["build" | "run", *_]:
            pass  # not installed everywhere; test_pages_serving.py checks the Dockerfile
        case _:
            assert shutil.which(name), name


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_a_command_names_what_there_is(page, line, monkeypatch):
    words = shlex.split(line)
    while words:
        end = next((place for place, word in enumerate(words) if word in ("&&", "|")), len(words))
        check_command(words[:end], monkeypatch)
        words = words[end + 1 :]


def test_all_commands_are_named():
    assert all(f"`{name}`" in PAGES["docs/commands.md"] for name in COMMANDS)


def test_all_public_names_are_on_the_api_pages():
    text = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    assert all(re.search(rf"\b{name}\b", text) for name in flagembedding_matryoshka.__all__)


def test_architecture_names_every_package():
    packages = [path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")]
    assert packages and all(f"| `{name}` |" in PAGES["docs/architecture.md"] for name in packages)


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_figures_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_readme_leads_to_every_page_of_the_guide():
    import yaml

    class Loader(yaml.SafeLoader):
        """Leaves the names of Python objects alone."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    guide = [page for part in nav if "Guide" in part for entry in part["Guide"] for page in entry.values()]
    assert guide and all(f"](docs/{page})" in README for page in guide)
