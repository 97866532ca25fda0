"""Build the site: pages outside docs, the picture of docs/imports.md, the repository link and links of docstrings."""

import re
import shutil
import subprocess
from pathlib import Path

from drawings import imports
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "benchmarks/results/scoring.png",
    "examples/demo_results/quality_cost.png",
    "examples/smollm2/README.md",
    "flagembedding_matryoshka/smollm2/README.md",
)
FLOWCHART = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)


def repository(remote):
    """Return address and name of a repository on the web, from the address that git clones; None for another address.

    >>> repository("git@example.org:owner/name.git")
    ('https://example.org/owner/name', 'owner/name')
    """
    found = re.fullmatch(r"(?:https://|(?:ssh://)?git@)([\w.-]+)[:/](.+?)(?:\.git)?/?", remote)
    return (f"https://{found[1]}/{found[2]}", found[2]) if found else None


def on_config(config):
    """Link the repository that the checkout was cloned from."""
    if shutil.which("git") is None:
        return config
    git = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
    if found := repository(git.stdout.strip()):
        config.repo_url, config.repo_name = found
    return config


def on_files(files, config):
    """Add the pages and figures outside docs, each at its path in the repository, and the picture of imports.md."""
    for path in OUTSIDE:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    arrows = re.findall(r"(\w+) --> (\w+)", (ROOT / "docs" / "imports.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "figures/imports.svg", content=str(imports(arrows))))
    return files


def on_page_markdown(markdown, page, **_):
    """Show the picture instead of its source. Links that leave docs lose a "../", because docs is the site's top."""
    if page.file.src_uri in OUTSIDE:
        return markdown
    up = "../" * page.file.src_uri.count("/")
    return FLOWCHART.sub("![Who imports whom](figures/imports.svg)", markdown).replace(f"](../{up}", f"]({up}")


def on_page_content(html, **_):
    """Link [`~module.name`] of a docstring to its place on a page, if it has one, and show its last name."""
    link = r'<autoref optional identifier="\1\2"><code>\2</code></autoref>'
    return re.sub(r"\[<code>~([\w.]*\.)(\w+)</code>\]", link, html)


def on_post_page(output, **_):
    """Leave out the theme's request to the repository's host for stars and forks: nothing is loaded from elsewhere."""
    return output.replace(' data-md-component="source"', "")
