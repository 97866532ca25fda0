"""How a page is built: something to copy first, short paragraphs, a short README."""

import re

import pytest

from tests.pages import PAGES

WRITTEN = {page: text for page, text in PAGES.items() if not page.startswith("docs/ablations/")}
"""All but the tables that `python -m benchmarks.ablations` writes."""


def paragraphs(text):
    """Paragraphs and list items, without fences, tables and headings."""
    text = re.sub(r"^ *```.*?^ *```", "\n", text, flags=re.DOTALL | re.MULTILINE)
    found = [item for block in re.split(r"\n\s*\n", text) for item in re.split(r"\n(?=\s*(?:- |\d+\. ))", block)]
    return [item.strip("\n") for item in found if item.strip() and not item.lstrip().startswith(("|", "#"))]


@pytest.mark.parametrize("page", WRITTEN)
def test_no_paragraph_has_more_than_five_lines(page):
    assert not [paragraph for paragraph in paragraphs(WRITTEN[page]) if paragraph.count("\n") >= 5]


@pytest.mark.parametrize("page", sorted(WRITTEN.keys() - {"README.md"}))
def test_a_page_begins_with_something_to_copy(page):
    """At most one paragraph stands between the title and the first command or snippet."""
    before, fence, _ = WRITTEN[page].partition("```")
    assert fence and len(paragraphs(before)) <= 1


def test_the_readme_is_short():
    assert PAGES["README.md"].count("\n") <= 90
