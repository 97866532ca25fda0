"""Join the dev queries of all kinds into one collection, on which depths and widths are measured.

    python examples/smollm2/recipe/choose.py DIR

DIR is where collect.py wrote; `python -m flagembedding_matryoshka.evaluation --split dev` then reads DIR/choose.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from flagembedding_matryoshka.files import write_text

HEADER = "query-id\tcorpus-id\tscore\n"


def renamed(path: Path, kind: str) -> Iterator[str]:
    """Lines of a corpus or of queries, whose ids begin with their kind."""
    with path.open(encoding="utf-8", newline="\n") as file:  # a text may hold other line breaks, such as U+2028
        rows = list(map(json.loads, file))
    for row in rows:
        yield json.dumps({**row, "_id": f"{kind}-{row['_id']}"}, ensure_ascii=False) + "\n"


def join(directory: Path, output: Path) -> int:
    """Write the joined collection and return how many kinds are in it.

    Raises:
        FileNotFoundError: if `directory` holds no collection with a dev split.
    """
    kinds = sorted(path.parents[1] for path in directory.glob("*/qrels/dev.tsv") if path.parents[1] != output)
    if not kinds:
        raise FileNotFoundError(f"{directory} has no */qrels/dev.tsv: collect.py writes them")
    for name in ("corpus.jsonl", "queries.jsonl"):
        write_text(output / name, "".join(line for kind in kinds for line in renamed(kind / name, kind.name)))
    judgements = [
        "\t".join([f"{kind.name}-{query}", f"{kind.name}-{passage}", grade])
        for kind in kinds
        for query, passage, grade in map(str.split, (kind / "qrels" / "dev.tsv").read_text().splitlines()[1:])
    ]
    write_text(output / "qrels" / "dev.tsv", HEADER + "\n".join(judgements) + "\n")
    return len(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    directory = parser.parse_args().directory
    print(f"Joined {join(directory, directory / 'choose')} kinds in {directory / 'choose'}.")


if __name__ == "__main__":
    main()
