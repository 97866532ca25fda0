"""What the worker thread computes: documents of many requests in one call of the re-ranker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.setting import Setting

UNLIMITED = 2**31


class Scorer:
    """A re-ranker as the server uses it."""

    def __init__(self, reranker: MatryoshkaReranker) -> None:
        self.reranker = reranker

    @property
    def max_tokens(self) -> int:
        """That one call spreads over the devices in one pass on each."""
        return self.reranker.max_tokens_per_batch * len(self.reranker.target_devices)

    def check(
        self, query: str, documents: Sequence[str], asked: Mapping[str, Any], truncate: bool = True
    ) -> tuple[Setting, int, list[int]]:
        """What a request runs, and its tokens, see `MatryoshkaReranker.count_tokens`. The model does not run.

        Args:
            asked: arguments of `MatryoshkaReranker.setting`. Requests of equal settings can share a batch.

        Raises:
            TypeError, ValueError: if the setting does not fit the model, the query leaves no room for a document, or
                with `truncate=False` a text is too long.
        """
        setting = self.reranker.setting(**asked)
        found = self.reranker.count_tokens(query, documents)
        if not truncate:
            whole = self.reranker.count_tokens(query, documents, max_length=UNLIMITED, query_max_length=UNLIMITED)
            if found != whole:
                raise ValueError(
                    f"with truncate=false query and document must fit into {self.reranker.max_length} tokens; the "
                    f"longest have {whole[0] + max(whole[1])} with separators and prompt."
                )
        return setting, *found

    def compute(self, setting: Setting, shares: list[Sequence[tuple[str, str]]]) -> list[list[dict[str, Any]]]:
        """Score the (query, document) pairs of each request; all pairs of a request have its query.

        Returns:
            for each pair a dict with "score", not normalised, and with a cascade "cutoff_layer".
        """
        rankings = self.reranker.rank_batch(
            [share[0][0] for share in shares],
            [[document for _, document in share] for share in shares],
            normalize=False,
            show_progress_bar=False,
            cascade=dict(setting.cascade) or None,
            **setting.arguments,
        )
        return [sorted(ranking, key=lambda hit: hit["corpus_id"]) for ranking in rankings]
