"""The sections of HTML pages and of GNOME's help pages, which are in Mallard."""

import re
from html.parser import HTMLParser

from sources.sections import Section, heading, is_prose
from sources.texts import plain

SKIPPED = {
    "script", "style", "pre", "table", "nav", "header", "footer", "info", "comment", "listing", "screen",
}  # fmt: skip
BLOCKS = {
    "p", "div", "li", "dd", "dt", "ul", "ol", "dl", "br", "hr", "body", "blockquote", "section", "item", "note", "td",
}  # fmt: skip


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
