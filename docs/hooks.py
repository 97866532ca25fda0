"""Figures and texts that lie outside docs are part of the site too: one link serves the repository and the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "benchmarks/results/scoring.png",
    "examples/demo_results/quality_cost.png",
    "examples/smollm2/README.md",
    "flagembedding_matryoshka/smollm2/README.md",
)


def on_files(files, config):
    """Each at the address that it has in the repository."""
    for path in OUTSIDE:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, **_):
    """From docs, those begin one folder higher; in the site, docs is the top."""
    return markdown if page.file.src_uri in OUTSIDE else markdown.replace("](../", "](")


def on_page_content(html, **_):
    """What a docstring names as [`~module.name`] is linked where it is on a page, and called by its last name."""
    link = r'<autoref optional identifier="\1\2"><code>\2</code></autoref>'
    return re.sub(r"\[<code>~([\w.]*\.)(\w+)</code>\]", link, html)
