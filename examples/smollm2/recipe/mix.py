"""Draw the rows of each kind that a stage of training sees.

    python examples/smollm2/recipe/mix.py DIR

Reads DIR/taught and writes DIR/short and DIR/long. The short stage has the first rows of a kind, the long stage the
last rows.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from flagembedding_matryoshka.files import write_text

SHORT = {
    "titles": 3000,
    "abstracts": 2000,
    "phrases": 3000,
    "notes": 3000,
    "medical": 2500,
    "wikipedia": 1200,
    "code": 2500,
    "docstrings": 1500,
    "sentences": 1500,
    "sections": 1000,
    "packages": 300,
    "glosses": 300,
}
LONG = {
    "titles": 1500,
    "abstracts": 3000,
    "phrases": 1500,
    "notes": 1500,
    "medical": 2500,
    "wikipedia": 1200,
    "code": 1500,
    "docstrings": 800,
    "sentences": 800,
    "sections": 500,
    "articles": 2500,
}
"""Rows of each kind, at most."""


def mix(taught: Path, output: Path, counts: Mapping[str, int], is_first: bool) -> int:
    """Write the first, or last, rows of each kind to `output`.

    Args:
        taught: folder with the rows of each kind, as teach.sh writes them.
        output: folder to write to.
        counts: number of rows of each kind at most.
        is_first: take the first rows of a kind; False takes the last rows.

    Returns:
        the number of rows written.

    Raises:
        FileNotFoundError: if `taught` has none of the kinds.
        ValueError: if `output` has rows of another kind, which training would read too.
    """
    names = {f"{kind}.jsonl" for kind in counts if (taught / f"{kind}.jsonl").is_file()}
    if not names:
        raise FileNotFoundError(f"{taught} has none of {', '.join(counts)}: run teach.sh, which writes them.")
    if others := sorted({path.name for path in output.glob("*.jsonl")} - names):
        raise ValueError(f"{output} has {', '.join(others)}, which this mixture does not contain: remove them.")
    written = 0
    for kind, count in counts.items():
        path = taught / f"{kind}.jsonl"
        if path.name not in names:
            print(f"{kind}: left out, there is no {path}")
            continue
        with path.open(encoding="utf-8", newline="\n") as file:  # a text may hold other line breaks, such as U+2028
            lines = list(file)
        chosen = lines[:count] if is_first else lines[-count:]
        write_text(output / path.name, "".join(chosen))
        written += len(chosen)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    directory = parser.parse_args().directory
    for name, counts, is_first in (("short", SHORT, True), ("long", LONG, False)):
        print(f"{name}: {mix(directory / 'taught', directory / name, counts, is_first)} rows")


if __name__ == "__main__":
    main()
