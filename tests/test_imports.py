"""docs/imports.md shows who imports whom; this keeps it true. `python -m tests.test_imports` writes it."""

from pathlib import Path

import pytest

PACKAGE = "flagembedding_matryoshka"
PAGE = Path(__file__).parents[1] / "docs" / "imports.md"
TEXT = """# Who imports whom

Rooms of the package, and the modules beside them; an arrow goes from who imports to what is imported, and all
point down. import-linter refuses one that does not, and a test keeps the picture true.

```mermaid
flowchart TD
{}
```
"""


def drawn() -> str:
    """The page, from what the modules import."""
    grimp = pytest.importorskip("grimp", reason="needs grimp, which import-linter brings")
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    rooms = sorted(graph.find_children(PACKAGE))
    arrows = [
        (importer, imported)
        for importer in rooms
        for imported in rooms
        if importer != imported and graph.direct_import_exists(importer=importer, imported=imported, as_packages=True)
    ]
    # What is imported by a room that another arrow leads to is reached through it: drawn once.
    needed = [
        (importer, imported)
        for importer, imported in arrows
        if not any((importer, middle) in arrows and (middle, imported) in arrows for middle in rooms)
    ]
    names = [(one.removeprefix(f"{PACKAGE}."), other.removeprefix(f"{PACKAGE}.")) for one, other in needed]
    return TEXT.format("\n".join(f"    {one} --> {other}" for one, other in names))


def test_the_picture_is_true():
    assert PAGE.read_text(encoding="utf-8") == drawn()


if __name__ == "__main__":
    PAGE.write_text(drawn(), encoding="utf-8")
