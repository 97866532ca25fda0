"""Python functions to find by what their docstring says or by what somebody would type into a search engine."""

import ast
import random
import re
import textwrap
import warnings
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

from docstrings import Pair, documented, environment_files, prose
from sources.surface import bare
from sources.texts import STOP_WORDS, seeded

MIN_LINES, MAX_LINES = 3, 40
KEPT_STOP_WORDS = {"from", "to", "in", "with", "without", "between", "into", "not", "all", "by", "of", "for", "if"}
PLACES = ["python {}"] * 4 + ["{} python"] * 2 + ["{} in python", "{} in Python", "{}", "{}"]
CLEAR = re.compile(r"(?!See |Should |Like )[A-Z][a-z]+ [\x20-\x3c\x3e-\x7e]+")
THIRD_PERSON = re.compile(
    r"^(return|compute|create|convert|get|set|check|load|read|write|add|remove|make|call|build|find)s\b"
)


def source_without_docstring(node: ast.AST, lines: list[str]) -> str:
    """A function's source from its def line on, dedented, its docstring cut out."""
    docstring = node.body[0]
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(line for line in kept if line.strip()))


def search_words(summary: str) -> str:
    """The words of a summary that somebody would type into a search engine."""
    words = [word for word in bare(summary).split() if word not in STOP_WORDS or word in KEPT_STOP_WORDS]
    return " ".join(words[:8])


def name_words(name: str) -> str:
    """The words of an identifier: `read_csv_file` and `readCSVFile` are "read csv file"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", name).strip().lower()


def query_for(name: str, summary: str, rng: random.Random) -> str:
    """The summary as it stands, or a search for it with or without the language's name."""
    draw, named = rng.random(), name_words(name)
    start = re.split(r"\. |[,(;:]", summary[:1].lower() + summary[1:])[0].strip()
    imperative = THIRD_PERSON.sub(r"\1", start).rstrip(".")
    if draw < 0.3 or len(start.split()) < 2:
        return summary
    if draw < 0.5 and len(named.split()) >= 3 and not name.startswith("_"):
        core = named
    elif draw < 0.65 and len(imperative.split()) <= 12 and THIRD_PERSON.match(imperative.split()[0] + "s"):
        core = "how to " + re.sub(r"^return\b", "get", imperative).lower()
    else:
        core = search_words(re.sub(r"^return\b", rng.choice(["return", "get"]), imperative))
    return rng.choice(PLACES).format(core)


def functions_of_file(path: Path) -> list[tuple[str, str, str]]:
    """Name, summary and source of the documented functions of a file that are neither short nor long."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    return list(functions_in(tree, text.split("\n")))


def functions_in(tree: ast.AST, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """The same for a syntax tree and the lines it was parsed from."""
    for node in documented(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("__"):
            continue
        summary = prose((ast.get_docstring(node) or "").partition("\n\n")[0])
        if not 4 <= len(summary.split()) <= 25 or not CLEAR.fullmatch(summary) or len(node.body) < 2:
            continue
        source = source_without_docstring(node, lines)
        if MIN_LINES <= source.count("\n") + 1 <= MAX_LINES and source.isascii():
            yield node.name, summary, source


def code_pairs(seed: int, reported: Container[str] = (), files: Iterable[Path] | None = None) -> Iterator[Pair]:
    """A query for each function of the files (None: the running environment) whose summary is not in `reported`."""
    with ProcessPoolExecutor() as pool:
        found = pool.map(functions_of_file, environment_files() if files is None else files, chunksize=64)
        for name, summary, source in chain.from_iterable(found):
            if summary in reported:
                continue
            yield Pair(query_for(name, summary, seeded(seed, "code", source)), source)
