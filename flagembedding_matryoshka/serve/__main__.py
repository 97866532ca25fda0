"""Serve a re-ranker over HTTP to clients of Cohere, Jina and text-embeddings-inference.

python -m flagembedding_matryoshka.serve --model smollm2

POST /rerank, /v1/rerank or /v2/rerank; GET /health, /metrics and, with a browser, /docs. If the environment variable
MATRYOSHKA_API_KEY or a file holds a key, re-ranking asks for it as bearer token.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.serve import Limits, create_app

API_KEY_VARIABLE = "MATRYOSHKA_API_KEY"


def read_api_key(path: Path | None) -> str | None:
    """The key in a file, else in the environment, else None.

    Raises:
        ValueError: if the key is empty.
    """
    key = os.environ.get(API_KEY_VARIABLE) if path is None else path.read_text(encoding="utf-8")
    if key is not None and not key.strip():
        raise ValueError(f"the API key in {path or API_KEY_VARIABLE} is empty.")
    return None if key is None else key.strip()


def build_parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="python -m flagembedding_matryoshka.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help="smollm2, or a layer-wise checkpoint or a directory that fine-tuning wrote"
    )
    parser.add_argument("--peft_path", nargs="+", help="LoRA adapters to merge, in order")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: bfloat16 where it is fast)")
    parser.add_argument("--devices", nargs="+", help="default: the first accelerator, else the CPU")
    parser.add_argument("--template", help="around query and passage: a name or a JSON file (default: the model's)")
    parser.add_argument("--max_layer", type=int, help="layers above are not loaded")
    parser.add_argument("--cutoff_layers", type=int, help="the exit of requests that name none (default: the deepest)")
    parser.add_argument("--compress_layers", type=int, nargs="+", help="for requests that name none")
    parser.add_argument("--compress_ratio", type=int, default=1, help="for requests that name none: 1, 2, 4 or 8")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a pair (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is every network (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--api_key_file", type=Path, help=f"default: the environment's {API_KEY_VARIABLE}")
    parser.add_argument(
        "--max_batch_tokens", type=int, help="computed in one pass (default: 1024 on a CPU, 16384 elsewhere)"
    )
    parser.add_argument("--max_batch_requests", type=int, help="in one pass; 1 computes each alone (default: any)")
    parser.add_argument(
        "--max_requests", type=int, default=limits.requests, help="at one time, else 429 (default: %(default)s)"
    )
    parser.add_argument(
        "--max_documents", type=int, default=limits.documents, help="in a request, else 422 (default: %(default)s)"
    )
    parser.add_argument(
        "--max_body_bytes", type=int, default=limits.body_bytes, help="of a request, else 413 (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line. SIGTERM and SIGINT end it when all requests that have arrived are answered."""
    options = build_parser().parse_args(arguments)
    api_key = read_api_key(options.api_key_file)
    reranker = MatryoshkaReranker(
        options.model,
        peft_path=options.peft_path,
        dtype=options.dtype,
        devices=options.devices,
        template=options.template,
        max_layer=options.max_layer,
        cutoff_layers=options.cutoff_layers,
        compress_layers=options.compress_layers,
        compress_ratio=options.compress_ratio,
        max_length=options.max_length,
        max_tokens_per_batch=options.max_batch_tokens,
    )
    limits = Limits(options.max_documents, options.max_body_bytes, options.max_requests, options.max_batch_requests)
    app = create_app(reranker, Path(options.model).name, limits, api_key)
    uvicorn.run(app, host=options.host, port=options.port, access_log=False)


if __name__ == "__main__":
    main()
