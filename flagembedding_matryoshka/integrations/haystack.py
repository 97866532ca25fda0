"""Haystack: `pipeline.add_component("ranker", MatryoshkaRanker(path, top_k=5))`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from math import inf
from os import PathLike
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import ComponentDevice, Secret

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.adapter import RankingAdapter


@component
class MatryoshkaRanker:
    """Rank documents, best first, and replace the retriever's score by the re-ranker's.

    As with Haystack's own rankers, documents of one id are ranked once. A document without content is ranked by its
    metadata.

    With fusion, the first stage's scores are the documents' scores. A returned document's score is the fused score, and
    its `meta` has "reranker_score" and "first_stage_score".

    Args:
        reranker: a re-ranker, or the path of one, which `warm_up` loads. Only pipelines with paths can be saved;
            `Pipeline.loads` needs this module in its `allowed_modules`.
        top_k: most documents to return; None is all.
        device: a `ComponentDevice`, or a device of torch; only with a path.
        token: token of the hub; a `Secret` if the pipeline is to be saved.
        scale_score: Haystack's name for `normalize`.
        options: as in [`~flagembedding_matryoshka.integrations.adapter.RankingAdapter`].

    Raises:
        TypeError, ValueError: if an option is unknown or contradicts another.
    """

    def __init__(
        self,
        reranker: MatryoshkaReranker | str | PathLike[str],
        top_k: int | None = None,
        device: ComponentDevice | str | None = None,
        token: Secret | str | None = None,
        scale_score: bool | None = None,
        **options: Any,
    ) -> None:
        if scale_score is not None:
            if options.get("normalize") is not None:
                raise ValueError(f"scale_score={scale_score} and normalize={options['normalize']}: give one of them.")
            options = options | {"normalize": scale_score}
        self.top_k = top_k
        self._ranking = RankingAdapter(
            reranker,
            device=device.to_torch_str() if isinstance(device, ComponentDevice) else device,
            token=token,
            **options,
        )

    def warm_up(self) -> None:
        """Load the model and check the options. Otherwise the first `run` does so.

        Raises:
            TypeError, ValueError: if the options do not fit the model.
        """
        self._ranking.check(self.top_k)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments, for a saved pipeline.

        Raises:
            ValueError: if the ranker was made from a loaded re-ranker, or its token is a string, which would be saved
                as it is.
        """
        arguments = self._ranking.arguments()
        if isinstance(arguments.get("token"), str):
            raise ValueError("token is a string, which would be saved as it is: give a haystack.utils.Secret.")
        if "cascade" in arguments:
            # Keys in a saved pipeline must be strings.
            arguments["cascade"] = {str(layer): share for layer, share in arguments["cascade"].items()}
        return default_to_dict(self, **arguments, top_k=self.top_k)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MatryoshkaRanker:
        """Make a ranker of the result of `to_dict`."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
        fusion: float | str | None = None,
    ) -> dict[str, list[Document]]:
        """Return copies of the best documents.

        Args:
            query: the query.
            documents: the documents; their `score` is read if scores are fused.
            top_k, scale_score, score_threshold, instruction, fusion: None keeps the ranker's own.

        Raises:
            TypeError, ValueError: as a call of [`~flagembedding_matryoshka.integrations.adapter.RankingAdapter`].
        """
        best: dict[str, Document] = {}
        for document in documents:
            known = best.get(document.id)
            if known is None or _retrieved(document) > _retrieved(known):
                best[document.id] = document
        documents = list(best.values())
        found = self._ranking(
            query,
            [document.content for document in documents],
            [document.meta for document in documents],
            self.top_k if top_k is None else top_k,
            score_threshold,
            scores=[document.score for document in documents],
            normalize=scale_score,
            instruction=instruction,
            fusion=fusion,
        )
        return {
            "documents": [
                replace(documents[hit.index], score=hit.score, meta=documents[hit.index].meta | hit.metadata)
                for hit in found
            ]
        }

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
        fusion: float | str | None = None,
    ) -> dict[str, list[Document]]:
        """Call `run` in a thread, so that it does not block the event loop."""
        return await asyncio.to_thread(
            self.run, query, documents, top_k, scale_score, score_threshold, instruction, fusion
        )


def _retrieved(document: Document) -> float:
    return -inf if document.score is None else document.score
