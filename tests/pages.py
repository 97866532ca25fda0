"""README.md and the pages of docs: their text, their Python blocks and their commands."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
"""Path from the repository's root to text."""


def blocks(page: str, language: str) -> list[str]:
    """What stands in a page's fences of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def snippets(page: str) -> list[tuple[str, str]]:
    """A page's Python blocks, each with the text block right after it, the output; "" if there is none."""
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGES[page], re.DOTALL)


def commands(page: str) -> list[str]:
    """A page's shell commands, each in one line, without comments."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := re.sub(r"\s#.*", "", line).strip())]
