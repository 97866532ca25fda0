"""Requests with several queries, a form of this server's own, and their answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from itertools import chain
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationInfo, WithJsonSchema, model_validator
from typing_extensions import Self, TypedDict

from flagembedding_matryoshka.serve.forms.cohere import CohereResult, Documents, DocumentTexts, ObjectsRequest
from flagembedding_matryoshka.serve.forms.common import (
    FirstStageScores,
    QueryDocuments,
    RequestScores,
    Usage,
)


class QueriesAnswer(TypedDict):
    """Cohere's answer, with the results of each query in `rankings`, in the order of the queries."""

    id: str
    model: str
    rankings: list[list[CohereResult]]
    meta: dict[str, Any]
    usage: Usage


class Query(BaseModel):
    """A query with its documents, and what differs from query to query."""

    model_config = ConfigDict(strict=True, extra="forbid")

    query: str
    documents: Documents
    instruction: str | None = Field(None, description="the query's own instruction. Default: the body's")
    first_stage_scores: FirstStageScores | None = Field(
        None, description="the first stage's score of each document of the query, a number or null"
    )


class QueriesRequest(ObjectsRequest):
    """Several queries, each with its documents. The other fields are for all of them, and unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")

    queries: Annotated[
        list[Query],
        FailFast(),
        Field(min_length=1, description="queries, each with its documents, in the order of the answer"),
        WithJsonSchema({"type": "array", "minItems": 1, "items": Query.model_json_schema()}),
    ]
    _read: list[tuple[Query, DocumentTexts]]
    """Each query, without its documents, and the documents."""

    @model_validator(mode="after")
    def _check_queries(self, info: ValidationInfo) -> Self:
        # A query without documents costs time, too.
        self._refuse_more_documents(sum(max(1, len(query.documents)) for query in self.queries), info)
        self._check_options()
        if self.first_stage_scores is not None:
            raise ValueError("first_stage_scores: give each of the queries its own")
        self._read = []
        for number, query in enumerate(self.queries):
            try:
                read = self._read_documents(query.documents, query.first_stage_scores, bool(self.return_documents))
            except ValueError as error:
                raise ValueError(f"{_place(number)}: {error}") from error
            query.documents = []
            self._read.append((query, read))
        self.queries = []
        with_texts = [(number, read.first_stage) for number, (_, read) in enumerate(self._read) if read.texts]
        without = [number for number, first_stage in with_texts if first_stage is None]
        if 0 < len(without) < len(with_texts):
            raise ValueError(
                f"{_place(without[0])} has no first-stage scores, but other queries do: give all of them some"
            )
        return self

    @property
    def lists(self) -> list[QueryDocuments]:
        return [
            QueryDocuments(
                query.query,
                read.texts,
                self.any_instruction if query.instruction is None else query.instruction,
                read.first_stage,
                _place(number),
            )
            for number, (query, read) in enumerate(self._read)
        ]

    @property
    def _held_texts(self) -> Iterable[str]:
        return chain.from_iterable((query.query, *read.held, *read.returned) for query, read in self._read)

    def drop_texts(self) -> None:
        for number, (query, read) in enumerate(self._read):
            query.query = ""
            self._read[number] = query, read._replace(texts=[])

    def answer(self, scores: RequestScores) -> QueriesAnswer:
        rankings = [own.best("relevance_score", self.top_n) for own in scores.of_queries]
        if self.return_documents:
            for results, (_, read) in zip(rankings, self._read, strict=True):
                for result in results:
                    result["document"] = json.loads(read.returned[result["index"]])
        return {
            "id": str(uuid.uuid4()),
            "model": scores.model,
            "rankings": rankings,
            "meta": scores.meta,
            "usage": scores.usage,
        }


def _place(number: int) -> str:
    return f"queries.{number}"
