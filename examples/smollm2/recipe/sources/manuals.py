"""The packages whose documentation is read, and the sections found in it."""

from collections.abc import Iterator
from pathlib import Path

from sources.debian import fetch, members
from sources.manpages import man_sections, pod_sections
from sources.markup import html_sections
from sources.sections import Section, is_question
from sources.texts import seeded

MANUALS = {  # what to read of each package, chosen to differ in subject and manner
    "anarchism": r"/html/.*\.html$",
    "apache2-doc": r"/manual/en/.*\.html$",
    "debian-faq": r"\.en\.html$",
    "debian-handbook": r"/en-US/[^/]*\.html$",
    "debian-history": r"\.en\.html$",
    "debian-reference-en": r"\.en\.html$",
    "developers-reference": r"/developers-reference/[^/]*\.html$",
    "gimp-help-en": r"/help/en/.*\.html$",
    "git-doc": r"\.html$",
    "gnome-user-docs": r"/help/C/.*\.page$",
    "gnumed-doc": r"\.html$",
    "grass-doc": r"\.html$",
    "harden-doc": r"/en-US/[^/]*\.html$",
    "lilypond-doc-html": r"Documentation/(?!internals)[^.]*/[^./]*\.html$",
    "linux-doc-6.1": r"/html/.*\.html$",
    "manpages": r"/man[1-8]/",
    "manpages-dev": r"/man[23]/",
    "octave-doc": r"/octave\.html/.*\.html$",
    "perl-doc": r"/(?!perl5\d*delta)[^/]*\.pod$",
    "postgresql-doc-15": r"\.html$",
    "privoxy": r"\.html$",
    "python-django-doc": r"/html/(?:topics|howto|intro|faq|ref)/.*\.html$",
    "python3.11-doc": r"/html/(?!_sources|whatsnew|c-api).*\.html$",
    "r-doc-html": r"\.html$",
    "sqlite3-doc": r"/sqlite3/[^/]*\.html$",
}
FILES, SECTIONS = 400, 600


def sections_of(name: str, content: bytes) -> Iterator[Section]:
    """The sections of a file that have prose, by the end of its name."""
    text = content.decode("utf-8", "replace")
    if name.endswith((".html", ".page")):
        found = html_sections(text)
    elif name.endswith(".pod"):
        found = pod_sections(text)
    else:
        found = man_sections(text)
    return (section for section in found if section.title and section.paragraphs)


def manual(package: str, cache: Path) -> list[Section]:
    """Sections of a package's documentation: a sample in which none outweighs the others, questions first."""
    deb = fetch(package, cache)
    if deb is None:
        return []
    files = sorted(members(deb, MANUALS[package]), key=lambda file: seeded(package, file[0]).random())
    found = [section for name, content in files[:FILES] for section in sections_of(name, content)]
    drawn = sorted(found, key=lambda section: seeded(section.title, section.paragraphs[0]).random())
    return sorted(drawn, key=lambda section: not is_question(section.title))[:SECTIONS]


def manuals(cache: Path) -> Iterator[Section]:
    """The sections of all manuals that could be had."""
    for package in MANUALS:
        yield from manual(package, cache)
