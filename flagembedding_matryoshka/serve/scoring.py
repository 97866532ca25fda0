"""What the worker thread computes: documents of many requests in one call of the re-ranker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker

UNLIMITED = 2**31


@dataclass(frozen=True)
class Options:
    """Depth and width that a request asks for; None is the re-ranker's default. Requests of equal options can share a
    batch."""

    cutoff_layers: tuple[int, ...] | None = None
    compress_layers: tuple[int, ...] | None = None
    compress_ratio: int | None = None
    cascade: tuple[tuple[int, float], ...] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of `MatryoshkaReranker.rank`."""
        return {
            "cutoff_layers": self.cutoff_layers,
            "compress_layers": self.compress_layers,
            "compress_ratio": self.compress_ratio,
            "cascade": None if self.cascade is None else dict(self.cascade),
        }


class Scorer:
    """A re-ranker as the server uses it."""

    def __init__(self, reranker: MatryoshkaReranker) -> None:
        self.reranker = reranker

    @property
    def max_tokens(self) -> int:
        """That one call spreads over the devices in one pass on each."""
        return self.reranker.max_tokens_per_batch * len(self.reranker.target_devices)

    def check(
        self, query: str, documents: Sequence[str], options: Options, truncate: bool = True
    ) -> tuple[int, list[int]]:
        """Tokens of a request, see `MatryoshkaReranker.count_tokens`. The model does not run.

        Raises:
            TypeError, ValueError: if the options do not fit the model, the query leaves no room for a document, or with
                `truncate=False` a text is too long.
        """
        self.reranker.rank(query, [], **options.arguments)
        found = self.reranker.count_tokens(query, documents)
        if not truncate:
            whole = self.reranker.count_tokens(query, documents, max_length=UNLIMITED, query_max_length=UNLIMITED)
            if found != whole:
                raise ValueError(
                    f"with truncate=false query and document must fit into {self.reranker.max_length} tokens; the "
                    f"longest have {whole[0] + max(whole[1])} with separators and prompt."
                )
        return found

    def compute(self, options: Options, shares: list[Sequence[tuple[str, str]]]) -> list[list[dict[str, Any]]]:
        """Score the (query, document) pairs of each request; all pairs of a request have its query.

        Returns:
            for each pair a dict with "score", not normalised, and with a cascade "cutoff_layer".
        """
        rankings = self.reranker.rank_batch(
            [share[0][0] for share in shares],
            [[document for _, document in share] for share in shares],
            normalize=False,
            show_progress_bar=False,
            **options.arguments,
        )
        return [sorted(ranking, key=lambda hit: hit["corpus_id"]) for ranking in rankings]
