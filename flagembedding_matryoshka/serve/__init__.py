"""A re-rank server over HTTP: `python -m flagembedding_matryoshka.serve --model …`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flagembedding_matryoshka.serve.app import create_app
    from flagembedding_matryoshka.serve.limits import Limits

__all__ = ["Limits", "create_app"]


def __getattr__(name: str) -> Any:
    # The application imports torch, which takes seconds. The command listens before.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from flagembedding_matryoshka.serve import app
    except ImportError as error:
        raise ImportError("serving needs FastAPI and more: pip install flagembedding_matryoshka[serve]") from error
    return getattr(app, name)
