"""Compute the states of passages after a store layer, so that `rank --store` ranks the passages by their ids.

flagembedding-matryoshka store --model MODEL --input corpus.jsonl --output DIR --store_layer 6 --compress_ratio 8

The input is a corpus in BEIR's layout: a line is {"_id": …, "text": …}, perhaps with a "title", which comes before the
text. Files may be compressed by gzip (.gz). If the output exists, passages are added to it. Passages that it has are
not computed again, so that a run that was interrupted goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from flagembedding_matryoshka.inference.arguments import add_reranker, given_options
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.models.split import StateQuantization
from flagembedding_matryoshka.parser import Parser
from flagembedding_matryoshka.text.collections import read_texts

WITHOUT = (
    "cutoff_layers",
    "budget",
    "quality",
    "prompt",
    "instruction",
    "query_instruction_for_rerank",
    "query_instruction_format",
    "batch_size",
    "normalize",
    "fusion",
)
"""Options of `MatryoshkaReranker` that stored states do not depend on."""


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="corpus to read; - is standard input")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the store")
    parser.add_argument(
        "--state_quantization",
        choices=get_args(StateQuantization),
        help="format of the states (default: the model's dtype)",
    )
    add_reranker(parser, without=WITHOUT)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    given = given_options(options)
    if not given.get("store_layer"):
        parser.error("--store_layer must be the number of layers after which passages are stored")
    passages = read_texts(options.input)
    reranker = MatryoshkaReranker(options.model, **given)
    progress = tqdm(passages.items(), desc="store", unit="passage", disable=None)
    store = reranker.store(progress, options.output, state_quantization=options.state_quantization)
    print(f"{options.output} has {len(store)} passages of {store.bytes_per_passage:.0f} bytes.")
