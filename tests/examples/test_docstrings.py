import pytest
from docstrings import Pair, collect_pairs, parse_pair, required_packages, source_files, split

BODY = "The words of this body are many enough to make a passage of a docstring that a summary line can look for."


def pairs(count):
    return [Pair(f"Return the number called item{i}.", f"{BODY} It is about item{i} alone.") for i in range(count)]


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package"
    (folder / "tests").mkdir(parents=True)
    source = f'def one():\n    """Return the first number there is.\n\n    {BODY}\n    """\n'
    (folder / "a.py").write_text(source)
    (folder / "b.py").write_text(source)
    (folder / "c.py").write_text("def broken(:\n")
    (folder / "d.py").write_text('raise RuntimeError("a module was imported")\n')
    (folder / "tests" / "e.py").write_text(source.replace("first", "last"))
    return folder


def test_files_are_read_not_imported_and_each_text_is_kept_once(package):
    assert collect_pairs(source_files(package)) == [Pair("Return the first number there is.", BODY)]


def test_the_text_does_not_depend_on_what_else_is_installed():
    required = required_packages("flagembedding_matryoshka", {"demo"})
    assert {"flagembedding", "torch", "bm25s", "matplotlib", "numpy"} <= required
    assert not {"pytest", "mypy", "langchain-core", "fastapi"} & required
    assert "pytest" in required_packages("flagembedding_matryoshka", {"dev"})


@pytest.mark.parametrize(
    "docstring", ["Too short.\n\n" + BODY, "Return the first number there is.\n\nShort.", "No body"]
)
def test_halves_that_are_too_short_make_no_pair(docstring):
    assert parse_pair(docstring) is None


def test_doctest_lines_and_markup_are_left_out():
    pair = parse_pair(f"Return the first ``number`` there is.\n\n>>> one()\n\n{BODY}\n-----\n")
    assert pair == Pair("Return the first number there is.", BODY)


def test_the_split_is_disjoint_and_does_not_depend_on_the_rest():
    many = pairs(1000)
    parts = split(many)
    assert sorted(map(repr, parts.train + parts.dev + parts.held_out)) == sorted(map(repr, many))
    assert 30 < len(parts.held_out) < 90 and 20 < len(parts.dev) < 60
    few = split(many[::7])
    assert set(few.held_out) <= set(parts.held_out) and set(few.train) <= set(parts.train)
