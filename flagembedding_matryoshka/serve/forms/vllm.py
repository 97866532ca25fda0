"""Requests to /score, of clients of vLLM, and their answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from itertools import chain, groupby
from typing import Literal

from pydantic import AliasChoices, Field, ValidationInfo, model_validator
from typing_extensions import Self, TypedDict

from flagembedding_matryoshka.serve.forms.common import (
    FUSION_FIELDS,
    OneOrMore,
    QueryDocuments,
    Request,
    RequestScores,
    Result,
    Usage,
)


class ScoreResult(Result):
    """A pair in vLLM's answer."""

    index: int
    object: Literal["score"]
    score: float


class ScoreAnswer(TypedDict):
    """vLLM's answer, in the order of the request."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreResult]
    usage: Usage


class ScoreRequest(Request):
    """vLLM's form of /score: one text against one or several, or lists of equal length."""

    other_texts = ("queries", "documents", "items", "data_1", "data_2")

    text_1: OneOrMore = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))
    text_2: OneOrMore = Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of query and document to score.

        Raises:
            ValueError: if there are several queries and another number of documents.
        """
        queries, documents = self.text_1, self.text_2
        if len(queries) == 1:
            queries = queries * len(documents)
        if len(queries) != len(documents):
            raise ValueError(
                f"text_1 has {len(queries)} texts and text_2 has {len(documents)}: give one in text_1, or equal numbers"
            )
        return list(zip(queries, documents, strict=True))

    @model_validator(mode="after")
    def _check_pairs(self, info: ValidationInfo) -> Self:
        self._refuse_more_documents(max(len(self.text_1), len(self.text_2)), info)
        if not self.pairs:
            raise ValueError("there are no texts")
        if self.min_score is not None:
            raise ValueError("min_score leaves results out of a ranking; /score answers every pair")
        if given := [name for name in FUSION_FIELDS if getattr(self, name) is not None]:
            raise ValueError(f"{' and '.join(given)} change the order of a ranking; /score answers every pair")
        return self

    @property
    def lists(self) -> list[QueryDocuments]:
        return [
            QueryDocuments(query, [text for _, text in pairs], self.any_instruction)
            for query, pairs in groupby(self.pairs, key=lambda pair: pair[0])
        ]

    @property
    def _held_texts(self) -> Iterable[str]:
        return chain(self.text_1, self.text_2)

    def drop_texts(self) -> None:
        self.text_1, self.text_2 = [], []

    def answer(self, scores: RequestScores) -> ScoreAnswer:
        data = sorted(scores.best("score", None), key=lambda result: result["index"])
        for result in data:
            result["object"] = "score"
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": scores.model,
            "data": data,
            "usage": scores.usage,
        }
