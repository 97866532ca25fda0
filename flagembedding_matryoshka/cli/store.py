"""Compute the states of passages after a store layer, so that `rank --store` ranks the passages by their ids.

flagembedding-matryoshka store --model MODEL --input corpus.jsonl --output DIR --store_layer 6 --compress_ratio 8

The input is a corpus in BEIR's layout: a line is {"_id": …, "text": …}, perhaps with a "title", which comes before the
text. Files may be compressed by gzip (.gz). If the output exists, passages are added to it. Passages that it has are
not computed again, so that a run that was interrupted goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from flagembedding_matryoshka.inference.arguments import add_reranker, given_options
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.parser import Parser
from flagembedding_matryoshka.text.collections import read_texts

OPTIONS = (
    "store_layer",
    "compress_layers",
    "compress_ratio",
    "peft_path",
    "dtype",
    "use_fp16",
    "use_bf16",
    "from_raw",
    "start_layer",
    "layer_sep",
    "max_layer",
    "quantization",
    "template",
    "passage_instruction_for_rerank",
    "passage_instruction_format",
    "max_tokens_per_batch",
    "query_max_length",
    "max_length",
    "devices",
    "compile",
    "batch_invariant",
    "cache_dir",
    "trust_remote_code",
    "token",
    "revision",
    "local_files_only",
    "allow_pickle",
)
"""Options of `MatryoshkaReranker` that states depend on, or how fast they are computed."""


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="corpus to read; - is standard input")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the store")
    add_reranker(parser, OPTIONS)
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
    store = reranker.store(tqdm(passages.items(), desc="store", unit="passage", disable=None), options.output)
    print(f"{options.output} has {len(store)} passages of {store.bytes_per_passage:.0f} bytes.")
