"""The sections of manual pages and of Perl's documentation, which is in POD."""

import re

from sources.sections import Section, heading, is_prose

POD_CODES = re.compile(r"[A-Z]<+\s?(?:[^<>|]*\|)?([^<>]*?)\s?>+")


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
