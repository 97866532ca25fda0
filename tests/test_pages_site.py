"""What docs/hooks.py makes of pages when the site is built."""

import runpy
from types import SimpleNamespace

import pytest

from tests.pages import PAGES, ROOT

pytest.importorskip("mkdocs", reason="needs MkDocs")


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return runpy.run_path(str(ROOT / "docs" / "hooks.py"))


def page(path):
    return SimpleNamespace(file=SimpleNamespace(src_uri=path))


@pytest.mark.parametrize(
    ("path", "link", "expected"),
    [
        ("index.md", "[card](../examples/smollm2/README.md)", "[card](examples/smollm2/README.md)"),
        ("index.md", "[how](how.md)", "[how](how.md)"),
        ("api/index.md", "[how](../how.md)", "[how](../how.md)"),
        ("api/index.md", "[card](../../examples/smollm2/README.md)", "[card](../examples/smollm2/README.md)"),
        ("examples/smollm2/README.md", "[card](../../README.md)", "[card](../../README.md)"),
    ],
)
def test_links_out_of_docs_start_at_the_top_of_the_site(hooks, path, link, expected):
    assert hooks["on_page_markdown"](link, page(path)) == expected


def test_the_picture_of_imports_replaces_its_source(hooks):
    shown = hooks["on_page_markdown"](PAGES["docs/imports.md"], page("imports.md"))
    assert "-->" not in shown and "](figures/imports.svg)" in shown


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        ("https://example.org/owner/name.git", ("https://example.org/owner/name", "owner/name")),
        ("https://example.org/owner/name", ("https://example.org/owner/name", "owner/name")),
        ("git@example.org:owner/name.git", ("https://example.org/owner/name", "owner/name")),
        ("ssh://git@example.org/owner/name", ("https://example.org/owner/name", "owner/name")),
        ("/srv/name", None),
        ("", None),
    ],
)
def test_the_site_links_the_repository_that_was_cloned(hooks, remote, expected):
    assert hooks["repository"](remote) == expected


def test_the_link_asks_no_other_site_for_numbers(hooks):
    link = '<a href="https://example.org" class="md-source" data-md-component="source">'
    assert "data-md-component" not in hooks["on_post_page"](link)
