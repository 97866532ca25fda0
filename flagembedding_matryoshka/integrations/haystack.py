"""Haystack: `pipeline.add_component("ranker", MatryoshkaRanker(path, top_k=5))`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haystack import Document, component, default_to_dict

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.ranking import Ranking


@component
class MatryoshkaRanker:
    """Keeps the best documents, the best first, with our score instead of the retriever's.

    Args:
        reranker: or the path of one, which `warm_up` loads. Pipelines with paths alone can be saved;
            `Pipeline.loads` wants this module in its `allowed_modules`.
        top_k: how many documents to keep; None is all.
        options: as in [`~flagembedding_matryoshka.integrations.ranking.Ranking`].
    """

    def __init__(self, reranker: MatryoshkaReranker | str, top_k: int | None = None, **options: Any) -> None:
        self.reranker = reranker
        self.top_k = top_k
        self.options = options
        self._ranking: Ranking | None = None

    def warm_up(self) -> None:
        """Load the model and check the options; the first `run` does so if nobody has.

        Raises:
            TypeError, ValueError: if the options do not fit the model.
        """
        if self._ranking is None:
            self._ranking = Ranking(self.reranker, self.top_k, self.options)

    def to_dict(self) -> dict[str, Any]:
        """The arguments, for a saved pipeline.

        Raises:
            ValueError: if the ranker was made from a re-ranker, of which the path alone would not say enough.
        """
        if not isinstance(self.reranker, str):
            raise ValueError("a ranker made from a MatryoshkaReranker cannot be saved: make it from a path.")
        options = self.options
        if options.get("cascade") is not None:
            # Saved pipelines have strings as keys alone.
            options = options | {"cascade": {str(layer): share for layer, share in options["cascade"].items()}}
        return default_to_dict(self, reranker=self.reranker, top_k=self.top_k, **options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MatryoshkaRanker:
        """The ranker that `to_dict` wrote."""
        arguments = dict(data["init_parameters"])
        if arguments.get("cascade") is not None:
            arguments["cascade"] = {int(layer): share for layer, share in arguments["cascade"].items()}
        return cls(**arguments)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Copies of the best documents; `top_k` overrides the ranker's own."""
        self.warm_up()
        assert self._ranking is not None
        texts: list[Any] = [document.content for document in documents]
        found = self._ranking(query, texts, top_k)
        return {"documents": [replace(documents[index], score=score) for index, score in found]}
