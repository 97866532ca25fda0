"""Serve a re-ranker over HTTP to clients of Cohere, Jina, Voyage, Xinference, vLLM and text-embeddings-inference.

python -m flagembedding_matryoshka.serve --model smollm2

POST /rerank, /v1/rerank, /v2/rerank or /score; GET /live, /ready, /health, /metrics, /info, /v1/models and, with a
browser, / and /docs. The server listens at once. It is ready when the model is loaded. SIGHUP loads it again. If the
environment variable MATRYOSHKA_API_KEY or a file holds a key, re-ranking requires it as bearer token. All answers and
logs have the X-Request-ID of their request.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagembedding_matryoshka.parser import Parser, program

try:
    import uvicorn

    from flagembedding_matryoshka.serve.keys import Keys
    from flagembedding_matryoshka.serve.limits import Limits
    from flagembedding_matryoshka.serve.logs import configure_logging, configure_transformers_logging
    from flagembedding_matryoshka.serve.protocol import impatient_protocol
    from flagembedding_matryoshka.serve.starting import Starting
    from flagembedding_matryoshka.serve.threads import in_background
except ImportError as error:
    raise ImportError("serving needs FastAPI and more: pip install flagembedding_matryoshka[serve]") from error

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker

# Functions below import what imports torch. That takes seconds, and the server listens before.

API_KEY_VARIABLE = "MATRYOSHKA_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
"""Names of this machine."""
WITHOUT = ("normalize",)
"""Arguments of the re-ranker that have no option: each request chooses its scores."""
OF_UVICORN = {
    "host": ("host", "127.0.0.1", "address to listen on; 0.0.0.0 is all networks"),
    "port": ("port", 8000, "port to listen on"),
    "uds": ("uds", None, "Unix socket to listen on, instead of host and port"),
    "root_path": ("root_path", "", "path of the server behind a proxy that removes it"),
    "forwarded_allow_ips": (
        "forwarded_allow_ips",
        "127.0.0.1",
        "addresses of proxies, comma-separated, whose X-Forwarded-For and X-Forwarded-Proto are believed; * is all",
    ),
    "ssl_certfile": ("ssl_certfile", None, "certificate, for HTTPS"),
    "ssl_keyfile": ("ssl_keyfile", None, "key of the certificate"),
    "timeout_keep_alive": (
        "keep_alive_seconds",
        75.0,
        "time between two requests on a connection; later the connection is closed. Choose more than the proxy in "
        "front of the server, which may send a request at its last moment",
    ),
    "timeout_graceful_shutdown": (
        "shutdown_seconds",
        30,
        "time to answer requests that have arrived before SIGTERM or SIGINT; later they get 503",
    ),
}
"""Option, its default and its explanation, of arguments of `uvicorn.Config`."""
OF_LIMITS = {
    "documents": "max_documents",
    "body_bytes": "max_body_bytes",
    "bytes": "max_bytes",
    "requests": "max_requests",
    "batch_requests": "max_batch_requests",
    "body_seconds": "body_seconds",
    "degrade_to": "degrade_to",
    "cache_bytes": "cache_bytes",
}
"""Option of each field of `Limits`, which has its default and its explanation."""
OF_CONNECTIONS = {
    "header_seconds": (10.0, "time for a request's header; later the connection is closed"),
    "answer_seconds": (30.0, "time for a client to read 128 KiB of its answer; later the connection is aborted"),
}
"""Default and explanation of arguments of `impatient_protocol`."""
PROGRAM = "flagembedding_matryoshka.serve"
WARM_UP = ([("query", "a document")], [("query", "a longer document " * 9), ("another query", "document")])
"""Pairs of two batches of different shapes."""
logger = logging.getLogger(__name__)


def read_api_keys(path: Path | None) -> Keys | None:
    """Return the keys in a file, or without a file the key in the environment; None if there is none.

    Raises: as `Keys.of_file` and `Keys.of_one`.
    """
    if path is not None:
        return Keys.of_file(path)
    text = os.environ.get(API_KEY_VARIABLE)
    return None if text is None else Keys.of_one(os.fsencode(text), API_KEY_VARIABLE)


def _add(group: Any, option: str, default: Any, about: str, kind: type) -> None:
    """Add an option. `kind` is the type of its values if the default is None."""
    text = f"{about} (default: %(default)s)" if default else about
    group.add_argument(f"--{option}", type=kind if default is None else type(default), default=default, help=text)


class FirstParser(Parser):
    """A parser of the options that listening needs, for `parse_known_args`. It imports no model.

    An abbreviation that `build_parser` takes for one of these options is unambiguous here, too.
    """

    skips_unknown = True

    def __init__(self) -> None:
        super().__init__(prog=program(PROGRAM), usage="%(prog)s --model MODEL …", add_help=False)
        self.add_argument("-h", "--help", action="store_true")
        self.add_argument("--model")
        for option, default, _ in OF_UVICORN.values():
            _add(self, option, default, "", str)
        for option, (default, _) in OF_CONNECTIONS.items():
            _add(self, option, default, "", float)
        _add(self, "body_seconds", Limits().body_seconds, "", float)
        _add_log_format(self)


def _add_log_format(group: Any) -> None:
    group.add_argument("--log_format", choices=("text", "json"), default="text", help="default: %(default)s")


def build_parser() -> Parser:
    """Return the parser of the server's command line."""
    from flagembedding_matryoshka.inference.arguments import add_reranker, as_help, explanations

    parser = Parser(prog=program(PROGRAM), description=__doc__)
    add_reranker(parser, without=WITHOUT, more_names={"max_tokens_per_batch": "max_batch_tokens"})
    server = parser.add_argument_group("the server")
    for option, default, about in OF_UVICORN.values():
        _add(server, option, default, about, str)
    server.add_argument(
        "--api_key_file",
        type=Path,
        help="file with the bearer token, or with a name and a token in each line; read again when it changes "
        f"(default: the environment's {API_KEY_VARIABLE})",
    )
    server.add_argument(
        "--store", type=Path, metavar="DIR", help="stored passages, which documents of requests may name by their ids"
    )
    server.add_argument(
        "--protect_all", action="store_true", help="ask for the token on /info, /v1/models and /metrics, too"
    )
    server.add_argument(
        "--allow_origins", nargs="+", default=(), help="origins of other sites' pages that may ask the server; * is all"
    )
    server.add_argument(
        "--allowed_hosts",
        nargs="+",
        help="values of the Host header that are answered; * is all (default: names of this machine if --host is one, "
        "otherwise all)",
    )
    limits, about_limits = Limits(), explanations(Limits)
    for name, option in OF_LIMITS.items():
        _add(server, option, getattr(limits, name), as_help(about_limits[name]), int)
    for option, (default, about) in OF_CONNECTIONS.items():
        _add(server, option, default, about, float)
    _add_log_format(server)
    return parser


def load_reranker(model: str, limits: Limits, store: Path | None = None, **options: Any) -> MatryoshkaReranker:
    """Load a re-ranker for a server and compute with it once on each device, so that no client waits for the start of
    a worker or for a compiler.

    Objects that exist then are never garbage again. The collector no longer visits them. A body of many JSON values
    would otherwise make it stop all threads for as long as it takes to visit the libraries' objects.

    Args:
        model, options: arguments of `MatryoshkaReranker`.
        store: directory of stored passages; None is none.

    Raises: as `MatryoshkaReranker`, its `open_store`, `check_degrade_to` and `check_cache`.
    """
    from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
    from flagembedding_matryoshka.serve.model import check_cache, check_degrade_to

    check_cache(limits.cache_bytes, options.get("batch_invariant", False))
    reranker = MatryoshkaReranker(model, **options)
    check_degrade_to(limits.degrade_to, reranker)
    if store is not None:
        reranker.open_store(store)
    for device in dict.fromkeys(reranker.target_devices):
        for pairs in WARM_UP:  # a compiler makes a kernel for one shape, and at the second one for all shapes
            reranker.compute_score(pairs, device=device)
    gc.collect()
    gc.freeze()
    return reranker


class Server(uvicorn.Server):
    """uvicorn's server, which listens before its application is imported and built. SIGHUP loads the model again.
    Windows has no such signal.

    Args:
        options: options of `FirstParser`.
        build: imports and builds the application, in a thread; see `Starting.run`. It gets a function that ends the
            server with an error.

    Attributes:
        failure: the error that ended the server, or None.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        build: Callable[[Callable[[BaseException], None]], tuple[Starlette, Callable[[], None]]],
    ) -> None:
        self._starting = Starting()
        self._build = build
        self.failure: BaseException | None = None
        config = uvicorn.Config(
            self._starting,
            http=impatient_protocol(options.header_seconds, options.body_seconds, options.answer_seconds),
            ws="none",
            lifespan="off",  # `_run` runs the application's, after its import
            access_log=False,
            log_config=None,
            **{name: getattr(options, option) for name, (option, *_) in OF_UVICORN.items()},
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._starting.reload)
        await super().startup(sockets)
        self._running = asyncio.create_task(self._run())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.config.uds is not None:  # asyncio leaves the file before Python 3.13
            Path(self.config.uds).unlink(missing_ok=True)
        await super().shutdown(sockets)
        self._running.cancel()
        await asyncio.wait([self._running])

    async def _run(self) -> None:
        try:
            await self._starting.run(in_background(partial(self._build, self._fail)))
        except (Exception, SystemExit) as error:  # argparse's errors are SystemExit
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.should_exit = True


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line. SIGTERM and SIGINT end it when all requests that have arrived are answered. SIGHUP loads the model
    again.

    Raises: errors of loading the model.
    """
    options, _ = FirstParser().parse_known_args(arguments)
    if options.help or options.model is None:
        build_parser().parse_args(arguments)  # prints, and ends the process
    configure_logging(options.log_format == "json")
    server = Server(options, partial(_build, arguments))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing in .* says which template", UserWarning)  # it is in the log
        with suppress(KeyboardInterrupt):  # under Python 3.10 uvicorn raises it again after its shutdown
            server.run()
    if server.failure is not None:
        raise server.failure


def _build(
    arguments: Sequence[str] | None, fail: Callable[[BaseException], None]
) -> tuple[Starlette, Callable[[], None]]:
    """Begin to load the model. Return the application and a function that loads the model again.

    Args:
        arguments: the command line.
        fail: called with the error if the model cannot be loaded.

    Raises: errors of the command line and of the file of keys, and as `create_app`.
    """
    from flagembedding_matryoshka.inference.arguments import given_options
    from flagembedding_matryoshka.serve.app import create_app

    configure_transformers_logging()
    options = build_parser().parse_args(arguments)
    keys = read_api_keys(options.api_key_file)
    is_local = options.host in LOOPBACK or options.uds is not None
    if keys is None and not is_local:
        logger.warning("the server listens on %s without an API key: everyone there can use it", options.host)
    limits = Limits(**{name: getattr(options, option) for name, option in OF_LIMITS.items()})
    load = partial(load_reranker, options.model, limits, options.store, **given_options(options))

    def check(loading: Future[MatryoshkaReranker]) -> None:
        if (error := loading.exception()) is not None:
            fail(error)

    loading = in_background(load)
    loading.add_done_callback(check)
    app = create_app(
        loading,
        Path(options.model).name,
        limits,
        keys,
        options.protect_all,
        options.allow_origins,
        options.allowed_hosts or (LOOPBACK if options.host in LOOPBACK and options.uds is None else ["*"]),
        options.store,
    )
    return app, partial(app.state.service.reload, load)


if __name__ == "__main__":
    main()
