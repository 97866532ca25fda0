"""Serve a re-ranker over HTTP to clients of Cohere, Jina, Voyage, Xinference, vLLM and text-embeddings-inference.

python -m flagembedding_matryoshka.serve --model smollm2

POST /rerank, /v1/rerank, /v2/rerank or /score; GET /live, /ready, /health, /metrics, /info, /v1/models and, with a
browser, / and /docs. The server listens at once. It is ready when the model is loaded. If the environment variable
MATRYOSHKA_API_KEY or a file holds a key, re-ranking requires it as bearer token. All answers and logs have the
X-Request-ID of their request.
"""

from __future__ import annotations

import argparse
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import uvicorn

from flagembedding_matryoshka.inference.arguments import add_reranker, given_options, program
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.parser import Parser
from flagembedding_matryoshka.serve import Limits, create_app
from flagembedding_matryoshka.serve.logs import log_config
from flagembedding_matryoshka.serve.model import check_degrade_to
from flagembedding_matryoshka.serve.protocol import impatient_protocol

API_KEY_VARIABLE = "MATRYOSHKA_API_KEY"
WITHOUT = ("normalize",)
"""Arguments of the re-ranker that have no option: each request chooses its scores."""
T = TypeVar("T")


def read_api_key(path: Path | None) -> str | None:
    """Return the key in a file, or without a file the key in the environment; None if there is none.

    White space of ASCII around the key does not count.

    Raises:
        ValueError: if the key is empty or not UTF-8.
    """
    text = os.environ.get(API_KEY_VARIABLE)
    key = path.read_bytes() if path is not None else None if text is None else os.fsencode(text)
    if key is not None and not key.strip():
        raise ValueError(f"the API key in {path or API_KEY_VARIABLE} is empty: write a key, or leave it out.")
    # Of bytes, because str.strip removes U+00A0 and U+0085, too, whose bytes end letters in UTF-8.
    return None if key is None else key.strip().decode()


def build_parser() -> Parser:
    limits = Limits()
    parser = Parser(prog=program("flagembedding_matryoshka.serve"), description=__doc__)
    add_reranker(parser, without=WITHOUT, more_names={"max_tokens_per_batch": "max_batch_tokens"})
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all networks (default: %(default)s)"
    )
    server.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    server.add_argument(
        "--api_key_file", type=Path, help=f"file with the bearer token (default: the environment's {API_KEY_VARIABLE})"
    )
    server.add_argument(
        "--max_batch_requests",
        type=int,
        help="most requests in a batch; 1 computes each request alone (default: as many as --max_batch_tokens allows)",
    )
    server.add_argument(
        "--max_requests",
        type=int,
        default=limits.requests,
        help="most requests that wait or are computed; others get 429 (default: %(default)s)",
    )
    server.add_argument(
        "--max_documents",
        type=int,
        default=limits.documents,
        help="most documents of a request; with more it gets 422 (default: %(default)s)",
    )
    server.add_argument(
        "--max_body_bytes",
        type=int,
        default=limits.body_bytes,
        help="most bytes of a body; a larger one gets 413 (default: %(default)s)",
    )
    server.add_argument(
        "--header_seconds",
        type=float,
        default=10.0,
        help="time for a request's header; later the connection is closed (default: %(default)s)",
    )
    server.add_argument(
        "--body_seconds",
        type=float,
        default=limits.body_seconds,
        help="time for a request's body; a later one gets 408 (default: %(default)s)",
    )
    server.add_argument(
        "--keep_alive_seconds",
        type=float,
        default=75.0,
        help="time between two requests on a connection; later the connection is closed. Choose more than the proxy in "
        "front of the server, which may send a request at its last moment (default: %(default)s)",
    )
    server.add_argument(
        "--degrade_to",
        type=int,
        metavar="EXIT",
        help="while more than half of --max_requests wait or are computed, answer requests that name no depth at this "
        "exit; each result then has its cutoff_layer (default: off)",
    )
    server.add_argument(
        "--shutdown_seconds",
        type=int,
        default=30,
        help="time to answer requests that have arrived before SIGTERM or SIGINT; later they get 503 (default: "
        "%(default)s)",
    )
    server.add_argument("--log_format", choices=("text", "json"), default="text", help="default: %(default)s")
    return parser


def in_background(function: Callable[[], T]) -> Future[T]:
    """Call a function in a thread that does not keep the process alive. Return the future of its result."""
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

    Raises: errors of loading the model.
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
    """Load the model and answer requests until the process is told to end."""

    def load() -> MatryoshkaReranker:
        reranker = MatryoshkaReranker(options.model, **given_options(options))
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
            timeout_keep_alive=options.keep_alive_seconds,
        )
    )

    def end_if_failed(loading: Future[MatryoshkaReranker]) -> None:
        if loading.exception() is not None:
            server.should_exit = True

    loading.add_done_callback(end_if_failed)
    with suppress(KeyboardInterrupt):  # under Python 3.10 uvicorn raises it again after its shutdown
        server.run()
    if loading.done():
        loading.result()


if __name__ == "__main__":
    main()
