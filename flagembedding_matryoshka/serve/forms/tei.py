"""Requests with `texts`, of clients of text-embeddings-inference (TEI), and their answer."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, ValidationInfo, model_validator
from typing_extensions import NotRequired, Self

from flagembedding_matryoshka.serve.forms.common import (
    Flag,
    QueryDocuments,
    RankedResult,
    Request,
    RequestScores,
    Texts,
)


class TeiResult(RankedResult):
    """A text in TEI's answer, which is a list of these."""

    index: int
    score: float
    text: NotRequired[str]


class TextsRequest(Request):
    """TEI's form. Its answer has no place for the number of operations."""

    other_texts = ("documents",)

    query: str
    texts: Texts
    top_n: int | None = Field(None, ge=1, description="most texts in the answer. Default: all")
    return_text: Flag | None = Field(None, description="whether results have their text. Default: false")
    _first_stage: list[float] | None = None

    @model_validator(mode="after")
    def _check_texts(self, info: ValidationInfo) -> Self:
        self._refuse_more_documents(len(self.texts), info)
        self._first_stage = self._read_first_stage(len(self.texts), self.first_stage_scores)
        return self

    @property
    def lists(self) -> list[QueryDocuments]:
        return [QueryDocuments(self.query, self.texts, self.any_instruction, self._first_stage)]

    @property
    def _held_texts(self) -> Iterable[str]:
        return self.texts

    def drop_texts(self) -> None:
        self.query = ""
        if not self.return_text:
            self.texts = []

    def answer(self, scores: RequestScores) -> list[TeiResult]:
        results = scores.best("score", self.top_n)
        if self.return_text:
            for result in results:
                result["text"] = self.texts[result["index"]]
        return results
