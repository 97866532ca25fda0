"""Headings and the prose under them, from HTML, Mallard help pages, Perl's POD and manual pages."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

from texts import plain

SKIPPED = {
    "script",
    "style",
    "pre",
    "table",
    "nav",
    "header",
    "footer",
    "info",
    "comment",
    "listing",
    "screen",
    "code-block",
}
BLOCKS = {
    "p",
    "div",
    "li",
    "dd",
    "dt",
    "ul",
    "ol",
    "dl",
    "br",
    "hr",
    "body",
    "blockquote",
    "section",
    "item",
    "note",
    "td",
}
NUMBERING = re.compile(
    r"^(?:(?:Chapter|Appendix|Section)\s+)?(?:[A-Z]\.|[A-Z]?\d+(?:\.\d+)*\.?|[A-Z](?:\.\d+)+\.?)\s+|^(?:§|Q:)\s*"
)
QUESTION = re.compile(
    r"^(?:what|how|why|when|where|who|which|can|do|does|did|is|are|should|will|isn't|aren't|don't|doesn't|wasn't)\b",
    re.IGNORECASE,
)
POD_CODES = re.compile(r"[A-Z]<+\s?(?:[^<>|]*\|)?([^<>]*?)\s?>+")


@dataclass
class Section:
    """A heading, the heading above it and the paragraphs up to the next heading."""

    title: str
    parent: str = ""
    paragraphs: list[str] = field(default_factory=list)


def heading(text: str) -> str:
    """A heading without its number and the sign that links to it, and not in capitals only."""
    title = NUMBERING.sub("", plain(text)).strip(" :.-")
    return title.capitalize() if title.isupper() and " " in title else title


def is_question(title: str) -> bool:
    """Whether a heading is a question that stands alone."""
    return QUESTION.match(title) is not None and len(title.split()) >= 4


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is a sentence or more and not a menu, a signature or a line of code."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return len(paragraph.split()) >= 8 and paragraph[-1] in ".!?:)\"'" and letters > 0.85 * len(paragraph)


class SectionParser(HTMLParser):
    """Collects sections from the events of an HTML or Mallard document."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[Section] = []
        self.above: list[tuple[int, str]] = []
        self.skipped: list[str] = []
        self.depth = 0
        self.mallard = False
        self.level: int | None = None
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED:
            self.skipped.append(tag)
        elif tag == "page":
            self.mallard = True
        elif (level := self.heading_level(tag)) is not None:
            self.flush()
            self.level = level
        elif tag == "title":
            self.text = []
        elif tag in BLOCKS and self.level is None:
            self.flush()
        self.depth += tag == "section"

    def handle_endtag(self, tag: str) -> None:
        if tag in self.skipped:
            del self.skipped[self.skipped.index(tag) :]
        elif self.level is not None and self.heading_level(tag) is not None:
            self.begin(self.level, "".join(self.text))
        elif tag == "title":
            page = re.split(r" \(| [|] | - ", plain("".join(self.text)))[0]
            self.above, self.text = [(-1, heading(page))], []
        elif tag in BLOCKS and self.level is None:
            self.flush()
        self.depth -= tag == "section"

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.text.append(data)

    def heading_level(self, tag: str) -> int | None:
        if re.fullmatch("h[1-6]", tag):
            return int(tag[1])
        return self.depth if self.mallard and tag == "title" else None

    def begin(self, level: int, title: str) -> None:
        self.above = [(at, text) for at, text in self.above if at < level]
        parent = self.above[-1][1] if self.above else ""
        title = heading(title)
        self.sections.append(Section(title, "" if parent == title else parent))
        self.above.append((level, title))
        self.level, self.text = None, []

    def flush(self) -> None:
        paragraph = plain("".join(self.text))
        self.text = []
        if self.sections and paragraph and is_prose(paragraph):
            self.sections[-1].paragraphs.append(paragraph)


def html_sections(text: str) -> list[Section]:
    """The sections of an HTML page or a Mallard help page."""
    parser = SectionParser()
    parser.feed(text)
    parser.close()
    parser.flush()
    return parser.sections


def pod_sections(text: str) -> list[Section]:
    """The sections of a document in Perl's POD; the parent is the =head1 above."""
    sections, parent = [], ""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(POD_CODES.sub(r"\1", POD_CODES.sub(r"\1", block)).split())
        if match := re.match(r"=head([12]) (.*)", line):
            title = heading(match[2])
            parent = title.capitalize() if match[1] == "1" else parent
            sections.append(Section(title, "" if match[1] == "1" else parent))
        elif sections and not block.startswith((" ", "\t", "=")) and line and is_prose(line):
            sections[-1].paragraphs.append(line)
    return sections


def man_sections(text: str) -> list[Section]:
    """The sections of a manual page; that of its NAME line is called what the line says after the dash."""
    sections, page, lines = [], "", []

    def flush() -> None:
        paragraph = " ".join(" ".join(lines).split())
        lines.clear()
        if sections and paragraph and is_prose(paragraph):
            sections[-1].paragraphs.append(paragraph)

    for line in text.splitlines():
        if match := re.match(r"\.S[HS] (.*)", line):
            flush()
            sections.append(Section(heading(plain_roff(match[1]).strip('"')).capitalize(), page))
        elif re.match(r"\.(?:P|PP|LP|TP|IP|HP|nf|fi|EX|EE|in|RS|RE)\b", line):
            flush()
        elif match := re.match(r"\.[BIR]{1,2} (.*)", line):
            lines.append(plain_roff(match[1].replace('" "', "").replace(" ", "") if line[2].isupper() else match[1]))
        elif not line.startswith((".", "'")):
            name, dash, what = plain_roff(line).partition(" - ")
            if dash and sections and sections[-1].title == "Name" and not page:
                page = name.split(",")[0].strip()
                sections[-1].title, sections[-1].parent = what.strip(), page
            else:
                lines.append(plain_roff(line))
    flush()
    named = next((section for section in sections if section.parent == page and section.title != "Name"), None)
    described = next((section for section in sections if section.title == "Description"), None)
    if named and described and named is not described:
        named.paragraphs, described.paragraphs = described.paragraphs, []
    return sections


def plain_roff(text: str) -> str:
    """A line of a manual page without its font changes and special characters."""
    text = re.sub(r"\\f(?:\[\w*\]|\(\w\w|\w)|\\[&|/,^c]", "", text).replace("\\-", "-").replace("\\(aq", "'")
    return (
        re.sub(r"\\\(..|\\\[\w+\]|\\\*\(..", " ", text)
        .replace("\\(em", " - ")
        .replace("\\ ", " ")
        .replace("\\e", "\\")
        .strip('"')
    )


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
