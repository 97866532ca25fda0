"""A re-rank server over HTTP: `python -m flagembedding_matryoshka.serve --model …`."""

try:
    from flagembedding_matryoshka.serve.app import create_app
    from flagembedding_matryoshka.serve.limits import Limits
except ImportError as error:
    raise ImportError("serving needs FastAPI and more: pip install flagembedding_matryoshka[serve]") from error

__all__ = ["Limits", "create_app"]
