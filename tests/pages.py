"""README.md and the pages of docs: their text, their Python blocks and their commands."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

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


def run_command(command: str) -> None:
    """Run a page's command: Python modules in this process, which has imported what they need, others in their own."""
    words = shlex.split(command)
    if words[0] == "flagembedding-matryoshka":
        words = ["python", "-m", "flagembedding_matryoshka", *words[1:]]
    if words[:2] == ["python", "-m"]:
        with mock.patch.object(sys, "argv", words[2:]):
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        return
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
