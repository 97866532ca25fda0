import ast
import gzip
import random
import tarfile

import pytest
from sources import debian
from sources.debian import fetch
from sources.descriptions import description, package_pairs
from sources.dictd import Entry, entries, gloss, number
from sources.functions import code_pairs, functions_in, name_words, query_for
from sources.glosses import about_meaning, about_word, is_headword
from sources.headings import section_pairs
from sources.manuals import sections_of
from sources.sections import Section, heading

LONG = "The reader of a page can see that the words of this sentence are many. And here is one more sentence of it."


def test_dictd_numbers_are_in_base_64():
    assert number("A") == 0 and number("BdqM") == 1 * 64**3 + 29 * 64**2 + 42 * 64 + 12


def test_dictd_entries_are_cut_by_the_index_and_each_text_is_given_once():
    content = b"Ape\n   A big monkey.\nBee\n   A fly that stings.\n"
    index = b"00databaseinfo\tA\tB\nape\tA\tV\nmonkey\tA\tV\nbee\tV\ta\n"
    assert list(entries(index, content)) == [
        Entry("Ape", "Ape\n   A big monkey.\n"),
        Entry("Bee", "Bee\n   A fly that stings.\n"),
    ]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (
            "bus\nbus line\n\n   <hardware> A set of {electrical} wires.\n\n   (1994-11-08)\n",
            "A set of electrical wires.",
        ),
        ('Abjure \\Ab*jure"\\, v. t. [imp. {A}; vb.\n   n. {B}.]\n   1. To renounce.\n', "To renounce."),
        ("farmer\n    n 1: a person who farms [syn: {f}]\n    2: an artist", "a person who farms"),
        ("HEARSE, n.  Death's baby-carriage.\n    Verse\n", "Death's baby-carriage. Verse"),
    ],
)
def test_a_gloss_is_the_longest_sense_in_plain_words(text, plain):
    assert gloss(text) == plain


def test_a_word_is_asked_for_by_name_and_by_meaning():
    rng = random.Random(1)
    assert all("ape" in about_word("ape", rng) for _ in range(20))
    assert about_meaning("Scottish mathematician who invented logarithms; introduced the point", rng) == (
        "who invented logarithms?"
    )
    assert "a dark oil obtained from leaves" in about_meaning("A dark oil obtained from leaves; bitter", rng)
    assert about_meaning("short", rng) is None
    assert is_headword("ice cream") and not is_headword("-oid") and not is_headword("42")


BLOCK = """Package: tool{0}
Description-en: tool number {0} for a test
 This tool, the {0}th, reads the words of a text and counts how often each of them is there.
 .
 All of these tools are parts of a family that has many members.
"""


def test_a_translation_block_has_a_short_description_and_paragraphs():
    short, paragraphs = description(BLOCK.format(1))
    assert short == "tool number 1 for a test"
    assert [text.split()[0] for text in paragraphs] == ["This", "All"]
    assert description("Package: none\n") is None


def test_paragraphs_that_packages_share_are_left_out():
    pairs = list(package_pairs(1, [BLOCK.format(number) for number in range(4)]))
    assert len(pairs) == 4 and not any("family" in pair.passage for pair in pairs)


HTML = f"""<html><head><title>The Book (version 2)</title><style>p {{}}</style></head><body>
<nav><p>{LONG}</p></nav><h1>1. Reading</h1><p>{LONG}<h2>1.2. Turning a page<a>¶</a></h2>
<pre>{LONG}</pre><ul><li>Home</li></ul><p>“Turn” {LONG}</p></body></html>"""


def test_html_sections_have_the_heading_above_and_prose_only():
    first, second = sections_of("a.html", HTML.encode())
    assert first == Section("Reading", "The Book", [LONG])
    assert second == Section("Turning a page", "Reading", [f'"Turn" {LONG}'])


def test_mallard_titles_are_headings():
    one = f"<section><title>One</title><p>{LONG}</p></section>"
    page = f"<page><info><title>no</title></info><title>Pages</title><p>{LONG}</p>{one}</page>"
    assert [(section.title, section.parent) for section in sections_of("a.page", page.encode())] == [
        ("Pages", ""),
        ("One", "Pages"),
    ]


def test_pod_and_manual_pages_have_sections():
    pod = f"=head1 NAME\n\n=head2 How can I read C<x>?\n\n{LONG}\n\n  code\n"
    assert list(sections_of("a.pod", pod.encode())) == [Section("How can I read x?", "Name", [LONG])]
    man = f'.TH A 1\n.SH NAME\na \\- read a page\n.SH DESCRIPTION\n{LONG}\n.SH "SEE ALSO"\n.BR b (1)\n'
    assert list(sections_of("a.1", man.encode())) == [Section("read a page", "a", [LONG])]


@pytest.mark.parametrize(
    ("text", "title"),
    [("A.1.2 What is it?", "What is it?"), ("Queries¶", "Queries"), ("SEE ALSO", "See also"), ("3.1. PIPES", "PIPES")],
)
def test_headings_lose_numbers_and_capitals(text, title):
    assert heading(text) == title


def test_a_heading_that_is_there_twice_is_named_with_the_one_above():
    sections = [Section("Reading a page", parent, [f"{parent}. {LONG}"]) for parent in ("Books", "Papers")]
    sections += [Section("How can pages be read?", "Books", [f"So: {LONG}"])]
    queries = [pair.query for pair in section_pairs(1, sections)]
    assert queries[2] == "How can pages be read?"
    assert all(parent in query for parent, query in zip(("Books", "Papers"), queries[:2], strict=True))


SOURCE = '''
class Table:
    def read_csv_file(self, path):
        """Return the rows of a file.

        Args: path
        """
        with open(path) as file:

            return list(file)

    def short(self):
        """Return a thing that is short."""
        return 1
'''


def test_functions_are_given_without_docstring_and_dedented():
    assert list(functions_in(ast.parse(SOURCE), SOURCE.split("\n"))) == [
        (
            "read_csv_file",
            "Return the rows of a file.",
            "def read_csv_file(self, path):\n    with open(path) as file:\n        return list(file)",
        )
    ]


def test_searches_for_code_are_made_of_the_summary_or_the_name(tmp_path):
    queries = {query_for("read_csv_file", "Returns the rows of a file.", random.Random(seed)) for seed in range(99)}
    assert {"Returns the rows of a file.", "python read csv file", "python how to get the rows of a file"} <= queries
    assert name_words("readCSVFile") == "read csv file" == name_words("_read_csv_file")
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text("def broken(:\n")
    files = sorted(tmp_path.glob("*.py"))
    assert len(list(code_pairs(1, files=files))) == 1
    assert not list(code_pairs(1, {"Return the rows of a file."}, files))


def test_members_of_a_package_are_read_from_its_archive(tmp_path, monkeypatch):
    (tmp_path / "page.html.gz").write_bytes(gzip.compress(b"text"))
    (tmp_path / "picture.png").write_bytes(b"")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("page.html.gz", "picture.png"):
            archive.add(tmp_path / name, arcname=f"./doc/{name}")
    (tmp_path / "dpkg-deb").write_text('#!/bin/sh\nexec cat "$2"\n')
    (tmp_path / "dpkg-deb").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert list(debian.members(tmp_path / "a.tar", "html")) == [("./doc/page.html", b"text")]


def test_where_apt_is_missing_a_package_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert fetch("a", tmp_path) is None and "a: left out" in capsys.readouterr().out
    (tmp_path / "a_1.deb").touch()
    assert fetch("a", tmp_path) == tmp_path / "a_1.deb"
