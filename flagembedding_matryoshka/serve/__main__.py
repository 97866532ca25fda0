"""Serve a re-ranker over HTTP to clients of Cohere, Jina, Voyage, Xinference, vLLM and text-embeddings-inference.

python -m flagembedding_matryoshka.serve --model smollm2

POST /rerank, /v1/rerank, /v2/rerank or /score; GET /live, /ready, /health, /metrics, /info, /v1/models and, with a
browser, /docs. It listens at once, and is ready when the model is loaded. If the environment variable
MATRYOSHKA_API_KEY or a file holds a key, re-ranking asks for it as bearer token. All answers and logs have the
X-Request-ID of their request.
"""

from __future__ import annotations

import argparse
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import uvicorn

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.serve import Limits, create_app
from flagembedding_matryoshka.serve.logs import log_config
from flagembedding_matryoshka.serve.options import add_options, given_options
from flagembedding_matryoshka.serve.protocol import impatient_protocol
from flagembedding_matryoshka.serve.scoring import check_degrade_to

API_KEY_VARIABLE = "MATRYOSHKA_API_KEY"
NOT_OF_A_SERVER = ("model_name_or_path", "normalize")
"""Arguments of the re-ranker: requests say themselves what scores they want."""
T = TypeVar("T")


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
    add_options(parser, MatryoshkaReranker, NOT_OF_A_SERVER, {"max_tokens_per_batch": "max_batch_tokens"})
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is every network (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--api_key_file", type=Path, help=f"default: the environment's {API_KEY_VARIABLE}")
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
    parser.add_argument(
        "--header_seconds", type=float, default=10.0, help="for a request's header, else closed (default: %(default)s)"
    )
    parser.add_argument(
        "--body_seconds", type=float, default=limits.body_seconds, help="for its body, else 408 (default: %(default)s)"
    )
    parser.add_argument(
        "--degrade_to",
        type=int,
        metavar="EXIT",
        help="while more than half of --max_requests wait or are computed, requests that name no depth are answered at "
        "this exit, and say so (default: all are answered as they ask)",
    )
    parser.add_argument(
        "--shutdown_seconds",
        type=int,
        default=30,
        help="for requests that have arrived when the server is told to end (default: %(default)s)",
    )
    parser.add_argument("--log_format", choices=("text", "json"), default="text", help="default: %(default)s")
    return parser


def in_background(function: Callable[[], T]) -> Future[T]:
    """What a function returns or raises, called in a thread that does not keep the process alive."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def call() -> None:
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=call, daemon=True).start()
    return future


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line. SIGTERM and SIGINT end it when all requests that have arrived are answered.

    Raises: what keeps the model from being loaded.
    """
    options = build_parser().parse_args(arguments)
    api_key = read_api_key(options.api_key_file)
    limits = Limits(
        documents=options.max_documents,
        body_bytes=options.max_body_bytes,
        requests=options.max_requests,
        batch_requests=options.max_batch_requests,
        body_seconds=options.body_seconds,
        degrade_to=options.degrade_to,
    )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing in .* says which template", UserWarning)  # it is in the log
        _serve(options, limits, api_key)


def _serve(options: argparse.Namespace, limits: Limits, api_key: str | None) -> None:
    """Load the model and answer requests, until the process is told to end."""

    def load() -> MatryoshkaReranker:
        reranker = MatryoshkaReranker(options.model, **given_options(MatryoshkaReranker, options))
        check_degrade_to(limits.degrade_to, reranker)
        return reranker

    loading = in_background(load)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(loading, Path(options.model).name, limits, api_key),
            host=options.host,
            port=options.port,
            http=impatient_protocol(options.header_seconds, options.body_seconds),
            ws="none",
            access_log=False,
            log_config=log_config(options.log_format == "json"),
            timeout_graceful_shutdown=options.shutdown_seconds,
        )
    )

    def end_if_failed(loading: Future[MatryoshkaReranker]) -> None:
        if loading.exception() is not None:
            server.should_exit = True

    loading.add_done_callback(end_if_failed)
    server.run()
    if loading.done():
        loading.result()


if __name__ == "__main__":
    main()
