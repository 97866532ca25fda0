"""Write some exits of a checkpoint, with the layers below them, as a smaller checkpoint.

flagembedding-matryoshka export --model smollm2 --cutoff_layers 9 12 --output part

Another format than "layerwise" writes one exit for another runtime, or several to folders of the output.

flagembedding-matryoshka export --model smollm2 --cutoff_layers 9 --format transformers --output cut
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from flagembedding_matryoshka.checkpoints.export.formats import PRECISIONS, Format
from flagembedding_matryoshka.cli.rows import PASSAGE, as_pair, name_of, read
from flagembedding_matryoshka.inference.arguments import add_reranker, given_options
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.parser import Parser

LOADING = (
    "cutoff_layers",
    "peft_path",
    "from_raw",
    "start_layer",
    "layer_sep",
    "max_layer",
    "template",
    "instruction",
    "query_max_length",
    "max_length",
)
"""Options of `MatryoshkaReranker` that change the checkpoint that is written."""


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory to write; it must be empty, or not exist")
    parser.add_argument("--dtype", default="float32", help="dtype of the written weights (default: %(default)s)")
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        default="layerwise",
        help="layerwise is this package's; transformers is also for sentence-transformers and vLLM; gguf is for "
        "llama.cpp (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=sorted({one for allowed in PRECISIONS.values() for one in allowed}),
        help="precision of the weights in the file: "
        + "; ".join(f"{format}: {', '.join(allowed)}" for format, allowed in PRECISIONS.items())
        + " (default: the first)",
    )
    parser.add_argument(
        "--sample",
        type=Path,
        metavar="FILE",
        help="pairs that int8 measures ranges on, in a file that `score` reads (default: built-in ones)",
    )
    parser.add_argument(
        "--allow_uncapped",
        action="store_true",
        help="export a model that caps its scores to a runtime that does not: the order stays, the values do not",
    )
    add_reranker(parser, (*LOADING, "cache_dir", "trust_remote_code", "allow_pickle"))
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        parser.error(f"--output {options.output} exists and is not an empty directory: name another one")
    rows = None if options.sample is None else list(read(options.sample, as_pair))
    MatryoshkaReranker(options.model, devices="cpu", **given_options(options)).export(
        str(options.output),
        format=options.format,
        precision=options.precision,
        sample=None if rows is None else [(row["query"], row[name_of(row, PASSAGE)]) for row in rows],
        allow_uncapped=options.allow_uncapped,
    )
    print(f"Wrote {options.output}.")
