"""What clients of Cohere, Jina and text-embeddings-inference (TEI) send and expect, and our own options in both."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
)


@dataclass(frozen=True)
class Scored:
    """A request's scores.

    Attributes:
        hits: for each document "score", not normalised, and with a cascade "cutoff_layer".
        tokens: that were read for it.
        model: its name.
    """

    hits: Sequence[dict[str, Any]]
    tokens: int
    model: str

    def best_first(self) -> list[tuple[int, dict[str, Any]]]:
        """Indices of the documents and their hits; the deeper a document came in a cascade the better."""
        return sorted(enumerate(self.hits), key=lambda pair: (-pair[1].get("cutoff_layer", 0), -pair[1]["score"]))


class Request(BaseModel):
    """What both forms have in common; None is the server's default."""

    model_config = ConfigDict(strict=True, extra="forbid")

    query: str
    cutoff_layers: int | list[int] | None = Field(None, description="the exit to score at")
    compress_layers: int | list[int] | None = Field(None, description="layers after which passages are compressed")
    compress_ratio: int | None = Field(None, description="1 (off), 2, 4 or 8")
    cascade: dict[int, float] | None = Field(None, description="{exit: share of all documents that goes deeper}")

    @property
    def setting(self) -> dict[str, Any]:
        """As keyword arguments of `MatryoshkaReranker.setting`."""
        return {name: getattr(self, name) for name in ("cutoff_layers", "compress_layers", "compress_ratio", "cascade")}

    @property
    def must_fit(self) -> bool:
        """Whether texts that are too long are refused, not cut."""
        return False


def _with_text(document: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(document, str):
        return document
    if not isinstance(document.get("text"), str):
        keys = [*document][:5]
        raise ValueError(f"a document is a string or an object with a string 'text', got the keys {keys!s:.200}")
    json.dumps(document, allow_nan=False)  # it may be sent back, and 1e999 is no number there
    return document


class DocumentsRequest(Request):
    """Cohere's and Jina's form. What "does nothing" is accepted because clients send it."""

    documents: Annotated[list[Annotated[str | dict[str, Any], AfterValidator(_with_text)]], FailFast()]
    top_n: int | None = Field(None, ge=1, description="how many to return; all if missing")
    return_documents: bool | None = Field(None, description="false if missing")
    model: str | None = Field(None, description="does nothing")
    max_tokens_per_doc: int | None = Field(None, description="does nothing")
    max_chunks_per_doc: int | None = Field(None, description="does nothing")
    rank_fields: list[str] | None = Field(None, description="does nothing: the text is ranked")
    priority: int | None = Field(None, description="does nothing")
    truncation: bool | None = Field(None, description="does nothing: texts are cut to the server's max_length")

    @property
    def texts(self) -> list[str]:
        return [document if isinstance(document, str) else document["text"] for document in self.documents]

    def answer(self, scored: Scored) -> dict[str, Any]:
        """Cohere's answer with Jina's `usage`; `relevance_score` is the score's sigmoid."""
        results = []
        for index, hit in scored.best_first()[: self.top_n]:
            result: dict[str, Any] = {"index": index, "relevance_score": sigmoid(hit["score"])}
            if "cutoff_layer" in hit:
                result["cutoff_layer"] = hit["cutoff_layer"]
            if self.return_documents:
                document = self.documents[index]
                result["document"] = {"text": document} if isinstance(document, str) else document
            results.append(result)
        return {
            "id": str(uuid.uuid4()),
            "model": scored.model,
            "results": results,
            "meta": {"api_version": {"version": "2"}, "tokens": {"input_tokens": scored.tokens, "output_tokens": 0}},
            "usage": {"prompt_tokens": scored.tokens, "total_tokens": scored.tokens},
        }


class TextsRequest(Request):
    """TEI's form."""

    texts: Annotated[list[str], FailFast()]
    raw_scores: bool = Field(False, description="scores instead of their sigmoid")
    return_text: bool = False
    truncate: bool | None = Field(None, description="false refuses texts that would be cut; else they are cut")
    truncation_direction: Literal["right", "Right"] = "Right"

    @property
    def must_fit(self) -> bool:
        return self.truncate is False

    def answer(self, scored: Scored) -> list[dict[str, Any]]:
        """TEI's answer, the best first."""
        results = []
        for index, hit in scored.best_first():
            result = {"index": index, "score": hit["score"] if self.raw_scores else sigmoid(hit["score"])}
            if "cutoff_layer" in hit:
                result["cutoff_layer"] = hit["cutoff_layer"]
            if self.return_text:
                result["text"] = self.texts[index]
            results.append(result)
        return results


def sigmoid(score: float) -> float:
    small = math.exp(-abs(score))
    return (1 if score >= 0 else small) / (1 + small)


def _form(body: Any) -> str | None:
    """Which form a body has; None is not an object."""
    return ("texts" if "texts" in body else "documents") if isinstance(body, dict) else None


AnyRequest = DocumentsRequest | TextsRequest
_FORMS: TypeAdapter[AnyRequest] = TypeAdapter(
    Annotated[
        Annotated[DocumentsRequest, Tag("documents")] | Annotated[TextsRequest, Tag("texts")], Discriminator(_form)
    ]
)


def parse(body: bytes) -> AnyRequest:
    """Read a request in either form.

    Raises:
        ValueError: naming the first things that are wrong and where they stand.
    """
    try:
        return _FORMS.validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        wrong = [".".join(map(str, ["body", *problem["loc"][1:]])) + f": {problem['msg']}" for problem in found[:5]]
        raise ValueError("; ".join(wrong)) from error


BODY_SCHEMA = {"anyOf": [form.model_json_schema() for form in (DocumentsRequest, TextsRequest)]}
