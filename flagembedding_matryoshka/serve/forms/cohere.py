"""Requests with `documents`, of clients of Cohere, Jina, Voyage, Xinference and vLLM, and their answers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, AliasChoices, FailFast, Field, ValidationInfo, model_validator
from typing_extensions import NotRequired, Self, TypedDict

from flagembedding_matryoshka.inference.fusion import as_first_stage_score
from flagembedding_matryoshka.inference.inputs import Passage
from flagembedding_matryoshka.serve.forms.common import (
    FIRST_STAGE_SCORE,
    Document,
    Flag,
    QueryDocuments,
    RankedResult,
    Request,
    RequestScores,
    Usage,
)

MAX_RANK_FIELDS = 32


def _refuse_repeated(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a field is named twice")
    return names


RankFields = Annotated[
    list[str],
    Field(min_length=1, max_length=MAX_RANK_FIELDS, fail_fast=True, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_refuse_repeated),
]
Documents = Annotated[
    list[str | Document],
    FailFast(),
    Field(
        description="texts, or objects with a text, or with nothing but the id of a stored passage. An object may have "
        f"the first stage's score, a number or null, in {FIRST_STAGE_SCORE}, which is not ranked as text"
    ),
]


class CohereResult(RankedResult):
    """A document in Cohere's answer."""

    index: int
    relevance_score: float
    document: NotRequired[dict[str, Any]]


class CohereAnswer(TypedDict):
    """Cohere's answer with Jina's `usage`."""

    id: str
    model: str
    results: list[CohereResult]
    meta: dict[str, Any]
    usage: Usage


class InfinityResult(RankedResult):
    """A document in Infinity's answer."""

    index: int
    relevance_score: float
    document: NotRequired[str]


class InfinityAnswer(TypedDict):
    """Infinity's answer, in Cohere's format."""

    id: str
    model: str
    results: list[InfinityResult]
    meta: dict[str, Any]
    usage: Usage


class VoyageResult(RankedResult):
    """A document in Voyage's answer."""

    index: int
    relevance_score: float
    document: NotRequired[str]


class VoyageAnswer(TypedDict):
    """Voyage's answer."""

    object: Literal["list"]
    data: list[VoyageResult]
    model: str
    usage: Usage


class DocumentTexts(NamedTuple):
    """The documents of a query, as they are ranked and answered.

    Attributes:
        texts: the ranked text of each document, or the id of a stored passage.
        returned: JSON of each document, if the answer repeats it; otherwise empty. It is smaller than the object, and
            its memory is known.
        first_stage: the first stage's score of each document; None without such scores.
    """

    texts: list[str | Passage]
    returned: list[str]
    first_stage: list[float] | None

    @property
    def held(self) -> Iterable[str]:
        """The texts and ids."""
        return (text if isinstance(text, str) else text.id or "" for text in self.texts)


class ObjectsRequest(Request):
    """Fields of forms whose documents may be objects."""

    top_n: int | None = Field(None, ge=1, description="most documents of a query in the answer. Default: all")
    return_documents: Flag | None = Field(None, description="whether results have their document. Default: false")
    return_operations: Flag | None = Field(
        None, description="whether `usage` has the floating-point operations. Default: false"
    )
    rank_fields: RankFields | None = Field(
        None, description="fields of documents that are objects to rank, in this order. Default: text"
    )
    max_chunks_per_doc: int | None = Field(
        None, ge=1, description="cut documents that are too long into this many chunks at most; the best one counts"
    )
    overlap: int | None = Field(
        None,
        ge=0,
        validation_alias=AliasChoices("overlap", "overlap_tokens"),
        description="tokens that a chunk shares with the previous one; cuts documents as max_chunks_per_doc does",
    )
    return_len: Flag | None = Field(None, description="does nothing: answers always count tokens")

    def _check_options(self) -> None:
        """Raise ValueError if options contradict each other."""
        lengths = self.lengths
        if self.chunks is not None and (lengths.refuse or lengths.keep_end or lengths.pair is not None):
            raise ValueError(
                "max_chunks_per_doc and overlap cut documents that are too long into chunks: leave out truncate=false, "
                "a truncation_direction of Left and truncate_prompt_tokens"
            )
        if FIRST_STAGE_SCORE in (self.rank_fields or ()):
            raise ValueError(
                f"rank_fields: {FIRST_STAGE_SCORE!r} is the first stage's score of a document and not a text: leave it "
                "out"
            )

    def _read_documents(
        self, documents: Sequence[str | Mapping[str, Any]], scores: Sequence[float | None] | None, returned: bool
    ) -> DocumentTexts:
        """Read the documents of a query.

        Args:
            scores: the query's `first_stage_scores`.
            returned: whether the answer has whole documents.

        Raises:
            ValueError: naming the document.
        """
        fields = ("text",) if self.rank_fields is None else tuple(self.rank_fields)
        own = [_first_stage_score(number, document) for number, document in enumerate(documents)]
        has_own = any(isinstance(document, dict) and FIRST_STAGE_SCORE in document for document in documents)
        first_stage = self._read_first_stage(len(documents), scores, own if has_own else None)
        texts: list[str | Passage] = []
        for number, document in enumerate(documents):
            if self.rank_fields is None and isinstance(document, Mapping) and _is_stored(document):
                texts.append(Passage(document["id"], None))
            else:
                texts.append(_ranked_text(number, document, fields))
        if self.return_documents and not returned:
            for number, text in enumerate(texts):
                if isinstance(text, Passage):
                    raise ValueError(f"documents.{number}: return_documents needs a text, and there is an id alone")
        return DocumentTexts(texts, [_returned(document) for document in documents] if returned else [], first_stage)

    @property
    def chunks(self) -> dict[str, Any] | None:
        if self.max_chunks_per_doc is None and self.overlap is None:
            return None
        return {"max_chunks_per_doc": self.max_chunks_per_doc, "overlap": self.overlap or 0}

    @property
    def counts_operations(self) -> bool:
        return bool(self.return_operations)


class DocumentsRequest(ObjectsRequest):
    """Cohere's form, and Jina's, Voyage's, Xinference's and vLLM's."""

    other_texts = ("texts",)

    query: str
    documents: Documents
    top_k: int | None = Field(None, ge=1, description="Voyage's name of top_n; the answer is then in Voyage's format")
    _read: DocumentTexts

    @model_validator(mode="after")
    def _check_documents(self, info: ValidationInfo) -> Self:
        self._refuse_more_documents(len(self.documents), info)
        if None not in (self.top_n, self.top_k):
            raise ValueError("top_n and top_k are one option with two names: give one of them")
        self._check_options()
        self._read = self._read_documents(self.documents, self.first_stage_scores, self._repeats_documents)
        self.documents = []
        return self

    @property
    def lists(self) -> list[QueryDocuments]:
        return [QueryDocuments(self.query, self._read.texts, self.any_instruction, self._read.first_stage)]

    @property
    def _is_voyage(self) -> bool:
        return "top_k" in self.model_fields_set

    @property
    def _repeats_texts(self) -> bool:
        """Whether the answer has the ranked texts only, as Voyage's."""
        return bool(self.return_documents) and self._is_voyage

    @property
    def _repeats_documents(self) -> bool:
        """Whether the answer has whole documents."""
        return bool(self.return_documents) and not self._repeats_texts

    @property
    def _held_texts(self) -> Iterable[str]:
        return chain(self._read.held, self._read.returned)

    def drop_texts(self) -> None:
        self.query = ""
        if not self._repeats_texts:
            self._read = self._read._replace(texts=[])

    def answer(self, scores: RequestScores) -> CohereAnswer | VoyageAnswer:
        """Return Voyage's answer to a request with `top_k`, Cohere's otherwise."""
        if self._is_voyage:
            return self._voyage_answer(scores)
        results = scores.best("relevance_score", self.top_n)
        if self.return_documents:
            for result in results:
                result["document"] = self._shown(result["index"])
        return {
            "id": str(uuid.uuid4()),
            "model": scores.model,
            "results": results,
            "meta": scores.meta,
            "usage": scores.usage,
        }

    def _shown(self, index: int) -> Any:
        """Return a document as an answer repeats it."""
        return json.loads(self._read.returned[index])

    def _voyage_answer(self, scores: RequestScores) -> VoyageAnswer:
        data = scores.best("relevance_score", self.top_k)
        if self.return_documents:
            for result in data:
                result["document"] = self._read.texts[result["index"]]
        return {"object": "list", "data": data, "model": scores.model, "usage": scores.usage}


class InfinityRequest(DocumentsRequest):
    """Infinity's form: Cohere's, where the document of a result is its text."""

    @property
    def _repeats_texts(self) -> bool:
        return bool(self.return_documents)

    def _shown(self, index: int) -> Any:
        return self._read.texts[index]


def _is_stored(document: Mapping[str, Any]) -> bool:
    """Return whether a document is the id of a stored passage, perhaps with the first stage's score."""
    return isinstance(document.get("id"), str) and not set(document) - {"id", FIRST_STAGE_SCORE}


def _ranked_text(number: int, document: str | Mapping[str, Any], fields: Sequence[str]) -> str:
    """Return the text of a document; a string counts as an object with a `text`.

    Raises:
        ValueError: if a field is missing or not a string.
    """
    values = {"text": document} if isinstance(document, str) else document
    for field in fields:
        if not isinstance(values.get(field), str):
            raise ValueError(
                f"documents.{number}: a document is a string or an object with a string {field!r:.40}, got the keys "
                f"{[*values][:5]!s:.200}"
            )
    return "\n".join(values[field] for field in fields)


def _returned(document: str | Mapping[str, Any]) -> str:
    """Return the JSON of a document in an answer.

    Raises:
        ValueError: if the document holds NaN or infinity, which JSON has no numbers for.
    """
    whole = {"text": document} if isinstance(document, str) else document
    return json.dumps(whole, ensure_ascii=False, allow_nan=False)


def _first_stage_score(number: int, document: str | Mapping[str, Any]) -> float | None:
    """Return the first stage's score in a document; None if the document has none, or is a string.

    Raises:
        ValueError: if the score is neither a finite number nor null.
    """
    if isinstance(document, str):
        return None
    try:
        return as_first_stage_score(f"documents.{number}.{FIRST_STAGE_SCORE}", document.get(FIRST_STAGE_SCORE))
    except TypeError as error:  # pydantic reports only a ValueError as an error of the body
        raise ValueError(str(error)) from error
