"""A small ranking task from text on every machine: find the body of a docstring by its summary line.

The docstrings of Python's standard library and of the packages that the demo requires are read with ``ast``. Nothing is
imported. The summary is the query, and the rest of the docstring its one relevant passage.
"""

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from inspect import cleandoc
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MIN_QUERY_WORDS, MAX_QUERY_WORDS = 3, 25
MIN_PASSAGE_WORDS, MAX_PASSAGE_WORDS = 15, 120
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "dist-packages", "__pycache__"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Pair:
    """A summary line and the passage that follows it."""

    query: str
    passage: str


@dataclass(frozen=True)
class Split:
    """Pairs for training, for tuning and for reports. No query and no passage is in two of the lists."""

    train: list[Pair]
    dev: list[Pair]
    held_out: list[Pair]


def environment_files() -> list[Path]:
    """Return source files of the standard library and of the packages that the package and its demo require."""
    required = required_packages("flagembedding_matryoshka", {"demo"}) - {"flagembedding-matryoshka"}
    found = [path for name in sorted(required) for path in package_files(name)]
    return [*source_files(Path(sysconfig.get_path("stdlib"))), *found]


def required_packages(name: str, extras: Iterable[str]) -> set[str]:
    """Return canonical names of the installed packages that a package with some extras requires, with its own name."""
    waiting, seen = [(name, frozenset(extras))], set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:  # required on another platform or by another Python
            continue
        seen.add((name, extras))
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {canonicalize_name(name) for name, _ in seen}


def package_files(name: str) -> list[Path]:
    """Return the Python files of an installed package in a fixed order, without test suites."""
    files = [file for file in distribution(name).files or [] if file.suffix == ".py" and ".." not in file.parts]
    return [Path(file.locate()) for file in sorted(files) if not SKIPPED_FOLDERS & set(file.parts[:-1])]


def source_files(root: Path) -> Iterator[Path]:
    """Yield Python files under a root in a fixed order, without test suites and folders of installed packages."""
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]):
            yield path


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of a source file in the order of its syntax tree; none if it is not valid Python 3."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    return [text for node in documented(tree) if (text := ast.get_docstring(node))]


def documented(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a module, its classes and functions, and those that are nested in them. Expressions are not visited."""
    if isinstance(node, DOCUMENTED):
        yield node
    for child in getattr(node, "body", ()):
        if isinstance(child, DOCUMENTED):
            yield from documented(child)


def prose(text: str) -> str:
    """Return a text as one line, without doctest input, reStructuredText markup and rulers."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith((">>>", "... ", ".. "))]
    joined = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(lines))
    return " ".join(re.sub(r"[`*]+|([-=~^#])\1{2,}", " ", joined).split())


def parse_pair(docstring: str) -> Pair | None:
    """Split a docstring after its first paragraph. Return None if a part is too short, too long or not English."""
    head, _, body = cleandoc(docstring).partition("\n\n")
    query, words = prose(head), prose(body).split()
    if not MIN_QUERY_WORDS <= len(query.split()) <= MAX_QUERY_WORDS or len(words) < MIN_PASSAGE_WORDS:
        return None
    pair = Pair(query, " ".join(words[:MAX_PASSAGE_WORDS]))
    letters = sum(character.isascii() and character.isalpha() for character in pair.passage)
    return pair if pair.query.isascii() and letters > 0.6 * len(pair.passage) else None


def normalise(text: str) -> str:
    """Return the words of a text in lower case. Two texts with the same words are equal."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def pairs_of_file(path: Path) -> list[Pair]:
    """Return the pairs of one source file."""
    return [pair for docstring in docstrings(path) if (pair := parse_pair(docstring))]


def collect_pairs(files: Iterable[Path] | None = None) -> list[Pair]:
    """Return the pairs of files, each query and each passage once; None is the files of the running environment."""
    files = environment_files() if files is None else files
    pairs, seen = [], set()
    with ProcessPoolExecutor() as pool:
        for pair in chain.from_iterable(pool.map(pairs_of_file, files, chunksize=64)):
            keys = {("query", normalise(pair.query)), ("passage", normalise(pair.passage)[:200])}
            if not keys & seen:
                seen |= keys
                pairs.append(pair)
    return pairs


def split(pairs: Iterable[Pair]) -> Split:
    """Send 6 % of the pairs to held_out and 4 % to dev, by a hash of the query. Other pairs do not change the split."""
    parts = Split([], [], [])
    for pair in pairs:
        bucket = int(hashlib.sha256(normalise(pair.query).encode()).hexdigest(), 16) % 100
        (parts.held_out if bucket < 6 else parts.dev if bucket < 10 else parts.train).append(pair)
    return parts


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write a JSON object in each line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
