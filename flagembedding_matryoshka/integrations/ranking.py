"""What the adapters have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker


class Ranking:
    """A re-ranker, and how it ranks.

    Args:
        reranker: or the path of one, loaded with its defaults.
        top_k: how many texts are left; None is all.
        options: what `MatryoshkaReranker.rank` takes: `cutoff_layers`, `compress_layers`, `compress_ratio`, `cascade`,
            `normalize`, …

    Raises:
        TypeError, ValueError: if the options do not fit the model.
    """

    def __init__(self, reranker: MatryoshkaReranker | str, top_k: int | None, options: Mapping[str, Any]) -> None:
        self.reranker = MatryoshkaReranker(reranker) if isinstance(reranker, str) else reranker
        self.top_k = top_k
        self.options = dict(options)
        self.reranker.rank("", [], top_k, **options)

    def __call__(self, query: str, texts: Sequence[str], top_k: int | None = None) -> list[tuple[int, float]]:
        """(index, score) of the best texts, the best first; `top_k` overrides the ranking's own."""
        hits = self.reranker.rank(query, texts, self.top_k if top_k is None else top_k, **self.options)
        return [(int(hit["corpus_id"]), float(hit["score"])) for hit in hits]
