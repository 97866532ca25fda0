"""Forms of requests and answers, one file for each family of clients."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from flagembedding_matryoshka.serve.forms.cohere import (
    CohereAnswer,
    DocumentsRequest,
    InfinityAnswer,
    InfinityRequest,
    VoyageAnswer,
)
from flagembedding_matryoshka.serve.forms.common import MAX_DOCUMENTS
from flagembedding_matryoshka.serve.forms.queries import QueriesAnswer, QueriesRequest
from flagembedding_matryoshka.serve.forms.tei import TeiResult, TextsRequest
from flagembedding_matryoshka.serve.forms.vllm import ScoreAnswer, ScoreRequest

T = TypeVar("T")
MAX_ERRORS = 5


def _tag(body: Any) -> str:
    """Return the form of a body to /rerank: with `queries` that of several queries, with `texts` TEI's."""
    given = [name for name in ("queries", "texts") if isinstance(body, dict) and body.get(name) is not None]
    return given[0] if given else "documents"


AnyRerank = Annotated[
    Annotated[DocumentsRequest, Tag("documents")]
    | Annotated[TextsRequest, Tag("texts")]
    | Annotated[QueriesRequest, Tag("queries")],
    Discriminator(_tag),
]
RERANK: TypeAdapter[DocumentsRequest | TextsRequest | QueriesRequest] = TypeAdapter(AnyRerank)
RERANK_SCHEMA = {"anyOf": [form.model_json_schema() for form in (DocumentsRequest, TextsRequest, QueriesRequest)]}
RerankAnswer = CohereAnswer | VoyageAnswer | list[TeiResult] | QueriesAnswer
INFINITY: TypeAdapter[InfinityRequest] = TypeAdapter(InfinityRequest)
INFINITY_SCHEMA = InfinityRequest.model_json_schema()
SCORE: TypeAdapter[ScoreRequest] = TypeAdapter(ScoreRequest)
SCORE_SCHEMA = ScoreRequest.model_json_schema()

__all__ = [
    "INFINITY",
    "INFINITY_SCHEMA",
    "RERANK",
    "RERANK_SCHEMA",
    "SCORE",
    "SCORE_SCHEMA",
    "InfinityAnswer",
    "RerankAnswer",
    "ScoreAnswer",
    "parse",
]


def parse(body: bytes, form: TypeAdapter[T], max_documents: int) -> T:
    """Read a request. A byte order mark before the body is passed over.

    Args:
        max_documents: most documents, or pairs, of a request.

    Raises:
        ValueError: naming the first errors and their fields.
    """
    try:
        return form.validate_json(body.removeprefix(codecs.BOM_UTF8), context={MAX_DOCUMENTS: max_documents})
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[:MAX_ERRORS]
        # The first place of an error of RERANK is the tag of its form.
        places = [problem["loc"][1:] if form is RERANK else problem["loc"] for problem in found]
        wrong = [
            ".".join(map(str, ["body", *place])) + f": {problem['msg']}"
            for place, problem in zip(places, found, strict=True)
        ]
        raise ValueError("; ".join(wrong)) from error
