"""Collections to train a small re-ranker on, from text that anyone can install: see README.md above this folder.

    python examples/smollm2/recipe/collect.py --output DIR

A kind of text whose collection is complete in DIR is not collected again: delete its folder to have it anew.
"""

import argparse
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from importlib.metadata import version as python_version
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from collection import HELD_OUT_PERCENT, counts, is_complete, write_collection
from docstrings import Pair, Split, collect_pairs, required_packages, split
from sources.abstracts import KINDS as ABSTRACT_KINDS
from sources.abstracts import abstract_pairs, distinct_titles
from sources.answers import medical_pairs, section_question_pairs
from sources.debian import translations, version
from sources.descriptions import description, package_pairs
from sources.functions import code_pairs
from sources.glosses import gloss_pairs
from sources.headings import section_pairs
from sources.manuals import manuals
from sources.prose import ARTICLE, prose_pairs
from sources.sections import Section
from sources.texts import cut, seeded

from flagembedding_matryoshka.files import write_text

MOST_ABSTRACTS = 80000


class Sources:
    """Sources of texts, each read once and only if an incomplete kind needs it.

    Args:
        seed: seed of all draws.
        cache: folder of downloaded package files.
        texts: folder with arxiv.jsonl.xz, medquad.jsonl.xz and selqa.jsonl.xz; None leaves out their kinds.
    """

    def __init__(self, seed: int, cache: Path, texts: Path | None = None) -> None:
        self.seed, self.cache, self.texts = seed, cache, texts

    @cached_property
    def _docstrings(self) -> Split:
        return split(collect_pairs())

    @property
    def docstrings(self) -> list[Pair]:
        """All but those that the demo reports on."""
        return self._docstrings.train + self._docstrings.dev

    @property
    def reported(self) -> set[str]:
        """The summary lines that the demo reports on."""
        return {pair.query for pair in self._docstrings.held_out}

    @cached_property
    def descriptions(self) -> list[str]:
        return list(translations())

    @cached_property
    def sections(self) -> list[Section]:
        return list(manuals(self.cache))

    @cached_property
    def glosses(self) -> list[Pair]:
        return list(gloss_pairs(self.seed, self.cache))

    @cached_property
    def abstracts(self) -> dict[str, list[Pair]]:
        rows = sorted(distinct_titles(self._rows("arxiv")), key=lambda row: seeded(self.seed, row["id"]).random())
        return abstract_pairs(self.seed, rows[:MOST_ABSTRACTS])

    def medical(self) -> Iterator[Pair]:
        """Questions on diseases with their answers."""
        return medical_pairs(self.seed, self._rows("medquad"))

    def section_questions(self) -> Iterator[Pair]:
        """Questions on sections of Wikipedia."""
        return section_question_pairs(self.seed, self._rows("selqa"))

    def _rows(self, name: str) -> Iterator[dict]:
        """Yield the rows of NAME.jsonl.xz in the folder `texts`; no rows without `--texts`."""
        if self.texts is not None:
            with lzma.open(self.texts / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
                yield from map(json.loads, lines)

    def articles(self) -> Iterator[str]:
        """Sections from their beginning on, under their heading as abstracts are."""
        for section in self.sections:
            text = " ".join(section.paragraphs)
            titled = seeded(self.seed, "article", text).random() < 0.5
            yield f"{section.title}. {text}" if titled else text

    def prose(self) -> Iterator[str]:
        """Whole paragraphs: of manuals what comes after a section's beginning, too."""
        for section in self.sections:
            for start in range(0, min(len(section.paragraphs), 24), 4):
                text = " ".join(section.paragraphs[start : start + 4])
                titled = seeded(self.seed, "titled", text).random() < 0.2
                yield f"{section.title}. {text}" if titled else text
        described = [parsed for block in self.descriptions if (parsed := description(block))]
        described.sort(key=lambda parsed: seeded(self.seed, parsed[0]).random())
        for _, paragraphs in described[:6000]:
            yield " ".join(paragraphs)
        yield from (pair.passage for pair in self.docstrings[:10000:3])
        yield from (pair.passage for pair in self.glosses)


def docstring_pairs(sources: Sources) -> Iterator[Pair]:
    """Summary lines and the beginnings of what follows them."""
    for pair in sources.docstrings:
        yield Pair(pair.query, cut(pair.passage, seeded(sources.seed, "docstrings", pair.passage)))


KINDS: dict[str, Callable[[Sources], Iterable[Pair]]] = {
    "docstrings": docstring_pairs,
    "code": lambda sources: code_pairs(sources.seed, sources.reported),
    "packages": lambda sources: package_pairs(sources.seed, sources.descriptions),
    "sections": lambda sources: section_pairs(sources.seed, sources.sections),
    "glosses": lambda sources: sources.glosses,
    "sentences": lambda sources: prose_pairs(sources.seed, sources.prose()),
    "articles": lambda sources: prose_pairs(sources.seed, sources.articles(), ARTICLE),
    **{kind: partial(lambda sources, kind: sources.abstracts.get(kind, ()), kind=kind) for kind in ABSTRACT_KINDS},
    "medical": Sources.medical,
    "wikipedia": Sources.section_questions,
}
PERCENT = {"wikipedia": 6}
"""Percentage of the queries in dev and in test for kinds other than `HELD_OUT_PERCENT`."""


def source_versions(cache: Path) -> dict[str, str]:
    """The versions of the packages whose text is used, Debian's by their files and Python's as installed."""
    python = required_packages("flagembedding_matryoshka", {"demo"}) - {"flagembedding-matryoshka"}
    versions = {f"deb {deb.name.split('_')[0]}": version(deb) for deb in sorted(cache.glob("*.deb"))}
    return versions | {f"python {name}": python_version(name) for name in sorted(python)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="where the collections go")
    parser.add_argument("--cache", type=Path, help="where package files go (default: OUTPUT/cache)")
    parser.add_argument(
        "--texts",
        type=Path,
        help="folder with arxiv.jsonl.xz, medquad.jsonl.xz and selqa.jsonl.xz, see README.md (default: leave out their "
        "kinds)",
    )
    parser.add_argument("--limit", type=int, default=5000, help="training queries per kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    cache = args.cache or args.output / "cache"
    sources, report = Sources(args.seed, cache, args.texts), {}
    for kind in args.kinds:
        directory = args.output / kind
        if not is_complete(directory) and not write_collection(
            directory, KINDS[kind](sources), args.limit, args.seed, PERCENT.get(kind, HELD_OUT_PERCENT)
        ):
            print(f"{kind}: left out, there is nothing to read", flush=True)
    for kind in filter(lambda kind: is_complete(args.output / kind), KINDS):
        report[kind] = counts(args.output / kind)
        print(kind, *(f"{name} {value}" for name, value in report[kind].items()), sep="  ", flush=True)
    summary = {"seed": args.seed, "limit": args.limit, "kinds": report, "sources": source_versions(cache)}
    write_text(args.output / "collect.json", json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
