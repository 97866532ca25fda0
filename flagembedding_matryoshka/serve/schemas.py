"""What clients of Cohere, Jina, Voyage, Xinference, vLLM and text-embeddings-inference (TEI) send; our options."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from typing_extensions import Self

from flagembedding_matryoshka.inference.fusion import as_first_stage, as_first_stage_score, reciprocal_ranks
from flagembedding_matryoshka.inference.options import CALIBRATED
from flagembedding_matryoshka.serve.answers import Scored, cohere_answer, tei_answer, vllm_scores, voyage_answer
from flagembedding_matryoshka.serve.fields import (
    FIRST_STAGE_SCORE,
    Cascade,
    Document,
    FirstStageScores,
    Flag,
    Milliseconds,
    Normalize,
    Number,
    OfChatTemplate,
    OneOrMore,
    Side,
    Texts,
    Weight,
)
from flagembedding_matryoshka.serve.shortening import Lengths

SETTING = ("cutoff_layers", "compress_layers", "compress_ratio", "cascade")
FUSION_FIELDS = ("first_stage_scores", "first_stage", "fusion")
NOT_TO_MISSPELL = (*SETTING, "deadline_ms", "instruction", "min_score", *FUSION_FIELDS)
MOST_UNKNOWN_FIELDS = 100
T = TypeVar("T")


class Request(BaseModel):
    """What all forms have in common; None is the server's default, and what is null is absent. Fields that nobody
    knows are left in `model_extra`."""

    model_config = ConfigDict(strict=True, extra="allow")
    other_texts: ClassVar[tuple[str, ...]] = ()
    """Fields that would hold the texts in another form."""

    model: str | None = Field(None, description="does nothing: the server has one")
    cutoff_layers: int | list[int] | None = Field(None, description="the exit to score at")
    compress_layers: int | list[int] | None = Field(None, description="layers after which passages are compressed")
    compress_ratio: int | None = Field(None, description="1 (off), 2, 4 or 8")
    cascade: Cascade | None = Field(None, description="{exit: share of all documents that goes deeper}")
    deadline_ms: Milliseconds | None = Field(
        None,
        description="from the request's arrival; documents go as deep as there is time, the most promising first, and "
        "each result says in cutoff_layer which exit it came to",
    )
    instruction: str | None = Field(
        None,
        description="what the task is, for a model whose template has a place for it; the model's own if missing, and "
        "an empty one is none",
    )
    instruct: str | None = Field(None, description="instruction, in SGLang's words")
    chat_template_kwargs: OfChatTemplate | None = Field(
        None, description="instruction, as vLLM gives it to a chat template; nothing else may be in it"
    )
    min_score: Number | None = Field(
        None,
        description="results with a lower score are left out; not with a cascade or a deadline, unless normalize is "
        '"calibrated"; with first-stage scores it is compared with model_score',
    )
    first_stage_scores: FirstStageScores | None = Field(
        None,
        description="the first stage's score of each document, to fuse with the model's score. Null means that the "
        "first stage did not find the document, which gets the lowest of these scores. Documents that are objects may "
        "have a first_stage_score instead",
    )
    first_stage: Literal["order"] | None = Field(
        None,
        description='"order": the documents are in the first stage\'s order, without scores. Rank r, from 1, has the '
        "first-stage score 1 / (60 + r)",
    )
    fusion: Weight | None = Field(
        None,
        description="the weight of the first stage's scores; \"auto\" is the weight in the model's plan. If missing, "
        "the server's --fusion, or with its --budget or --quality the plan's weight",
    )
    normalize: Normalize | None = Field(
        None,
        description='true (default) is the sigmoid of scores, false is raw_scores, and "calibrated" the probability of '
        "relevance by the model's plan",
    )
    raw_scores: Flag | None = Field(None, description="scores instead of their sigmoid")
    use_activation: Flag | None = Field(None, description="false is raw_scores, in vLLM's words")
    truncate: Flag | None = Field(None, description="false refuses texts that would be cut; else they are cut")
    truncation: Flag | None = Field(None, description="truncate, in Voyage's words")
    truncation_direction: Side | None = Field(None, description="where documents are cut: Right (default) or Left")
    truncation_side: Side | None = Field(None, description="truncation_direction, in vLLM's words")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="of query, document and prompt together, at most; -1 is the server's own limit"
    )
    max_tokens_per_doc: int | None = Field(None, ge=1, description="a document is cut to its first so many tokens")
    max_tokens_per_query: int | None = Field(None, ge=1, description="the query is cut to its first so many tokens")
    priority: int | None = Field(None, description="does nothing")
    _first_stage: list[float] | None = None

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        unknown = self.model_extra or {}
        if len(unknown) > MOST_UNKNOWN_FIELDS:
            raise ValueError(f"{len(unknown)} fields are unknown, more than {MOST_UNKNOWN_FIELDS}")
        for name, value in unknown.items():
            if name in self.other_texts and value is not None:
                raise ValueError(f"there are texts in {name!r}, too; give one list of them")
            if close := get_close_matches(name[:40], NOT_TO_MISSPELL, 1, 0.8):
                raise ValueError(f"{name!r:.40} is unknown; {close[0]!r} is what it looks like")
        if None not in (self.truncation_direction, self.truncation_side):
            raise ValueError("truncation_direction and truncation_side are one; give one")
        if len(set(self._instructions.values())) > 1:
            raise ValueError(f"{' and '.join(self._instructions)} are one option with several names, and differ")
        if self.normalize is not None and not {self.raw_scores, self.use_activation} <= {None}:
            raise ValueError("normalize says what raw_scores and use_activation say, too; give one of them")
        return self

    @property
    def _instructions(self) -> dict[str, str]:
        """Each name of the instruction under which there is one."""
        in_kwargs = (self.chat_template_kwargs or {}).get("instruction")
        names = ("instruction", "instruct", "chat_template_kwargs.instruction")
        found = zip(names, (self.instruction, self.instruct, in_kwargs), strict=True)
        return {name: text for name, text in found if text is not None}

    @property
    def wanted_instruction(self) -> str | None:
        """The instruction, whatever its name; None is the model's own."""
        return next(iter(self._instructions.values()), None)

    @property
    def setting(self) -> dict[str, Any]:
        """As keyword arguments of `MatryoshkaReranker.setting`."""
        return {name: getattr(self, name) for name in SETTING}

    @property
    def needs_its_depth(self) -> bool:
        """Whether it says at which exits, or until when, it is to be answered, or what a score of its exit means."""
        names_depth = (self.cutoff_layers, self.cascade, self.deadline_ms) != (None, None, None)
        return names_depth or self.min_score is not None or self.normalize == CALIBRATED

    @property
    def lengths(self) -> Lengths:
        """How texts are cut."""
        return Lengths(
            query=self.max_tokens_per_query,
            document=self.max_tokens_per_doc,
            pair=None if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens,
            keep_end="left" in (self.truncation_direction, self.truncation_side),
            refuse=False in (self.truncate, self.truncation),
        )

    @property
    def chunks(self) -> dict[str, Any] | None:
        """As keyword arguments of `MatryoshkaReranker.cut_chunks`; None is no chunks."""
        return None

    @property
    def scores_shown(self) -> dict[str, Any]:
        """Which scores an answer shows, as keyword arguments of `MatryoshkaReranker.normalizer`."""
        normalize = not (self.raw_scores or self.use_activation is False) if self.normalize is None else self.normalize
        return {"normalize": normalize, "min_score": self.min_score}

    @property
    def first_stage_of_documents(self) -> Sequence[float] | None:
        """The first stage's score of each document; None if the request gives none."""
        return self._first_stage

    def _read_first_stage(self, documents: int, own: Sequence[float | None] | None = None) -> None:
        """Check the first stage's scores and store them.

        Args:
            documents: number of documents.
            own: scores in the documents; None if no document has one.

        Raises:
            ValueError: if scores are given in several ways, their number is not that of documents, or a weight is given
                without scores.
        """
        ways = {
            "first_stage_scores": self.first_stage_scores,
            f"first_stage={self.first_stage!r}": self.first_stage,
            f"the {FIRST_STAGE_SCORE} of documents": own,
        }
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give the first stage's scores in one of these ways")
        if not given and self.fusion is not None:
            if documents:
                raise ValueError(
                    f"fusion={self.fusion!r} needs the first stage's scores: give first_stage_scores, a "
                    f"{FIRST_STAGE_SCORE} in documents that are objects, or first_stage='order' for documents in its "
                    "order"
                )
            own = []
        if self.first_stage is not None:
            self._first_stage = reciprocal_ranks(documents)
            return
        values = self.first_stage_scores if own is None else own
        if values is not None and len(values) != documents:
            raise ValueError(f"first_stage_scores: {len(values)} scores for {documents} documents")
        self._first_stage = None if values is None else as_first_stage(0, values, documents)

    @property
    def counts_operations(self) -> bool:
        """Whether the answer says what it has cost. TEI's has no place for it."""
        return False

    @property
    def lists(self) -> list[tuple[str, Sequence[str]]]:
        """Each query with its documents."""
        raise NotImplementedError

    def answer(self, scored: Scored) -> Any:
        """What the clients of this form read."""
        raise NotImplementedError


class DocumentsRequest(Request):
    """Cohere's form, and Jina's, Voyage's, Xinference's and vLLM's."""

    other_texts = ("texts",)

    query: str
    documents: Annotated[
        list[str | Document],
        FailFast(),
        Field(
            description=f"texts, or objects with a text. An object may have the first stage's score, a number or null, "
            f"in {FIRST_STAGE_SCORE}, which is not ranked as text"
        ),
    ]
    top_n: int | None = Field(None, ge=1, description="how many to return; all if missing")
    top_k: int | None = Field(None, ge=1, description="top_n, in Voyage's words, whose answer it brings")
    return_documents: Flag | None = Field(None, description="false if missing")
    return_operations: Flag | None = Field(None, description="floating-point operations in `usage`; false if missing")
    rank_fields: list[str] | None = Field(
        None, min_length=1, description="what of documents that are objects is ranked, in this order; 'text' if missing"
    )
    max_chunks_per_doc: int | None = Field(
        None, ge=1, description="documents that are too long are cut into so many chunks, at most; the best one counts"
    )
    overlap: int | None = Field(
        None,
        ge=0,
        validation_alias=AliasChoices("overlap", "overlap_tokens"),
        description="tokens that chunks have in common with the one before; cuts documents as max_chunks_per_doc does",
    )
    return_len: Flag | None = Field(None, description="does nothing: tokens are counted in any case")
    _texts: list[str]

    @model_validator(mode="after")
    def _check_documents(self) -> Self:
        if None not in (self.top_n, self.top_k):
            raise ValueError("top_n and top_k are one; give one")
        lengths = self.lengths
        if self.chunks is not None and (lengths.refuse or lengths.keep_end or lengths.pair is not None):
            raise ValueError(
                "max_chunks_per_doc and overlap read documents that are too long in chunks; without truncate=false, a "
                "truncation_direction of Left and truncate_prompt_tokens"
            )
        fields = ("text",) if self.rank_fields is None else tuple(self.rank_fields)
        if FIRST_STAGE_SCORE in fields:
            raise ValueError(
                f"rank_fields: {FIRST_STAGE_SCORE!r} is the first stage's score of a document and not a text: leave it "
                "out"
            )
        own = [_first_stage_score(number, document) for number, document in enumerate(self.documents)]
        has_own = any(isinstance(document, dict) and FIRST_STAGE_SCORE in document for document in self.documents)
        self._read_first_stage(len(self.documents), own if has_own else None)
        self._texts = [_ranked_text(number, document, fields) for number, document in enumerate(self.documents)]
        return self

    @property
    def chunks(self) -> dict[str, Any] | None:
        if self.max_chunks_per_doc is None and self.overlap is None:
            return None
        return {"max_chunks_per_doc": self.max_chunks_per_doc, "overlap": self.overlap or 0}

    @property
    def counts_operations(self) -> bool:
        return bool(self.return_operations)

    @property
    def lists(self) -> list[tuple[str, Sequence[str]]]:
        return [(self.query, self._texts)]

    def answer(self, scored: Scored) -> dict[str, Any]:
        """Voyage's answer to who says `top_k`; else Cohere's, with Jina's `usage`."""
        if "top_k" in self.model_fields_set:
            return voyage_answer(scored, self.top_k, self._texts if self.return_documents else None)
        return cohere_answer(scored, self.top_n, self.documents if self.return_documents else None)


class TextsRequest(Request):
    """TEI's form."""

    other_texts = ("documents",)

    query: str
    texts: Texts
    top_n: int | None = Field(None, ge=1, description="how many to return; all if missing")
    return_text: Flag | None = Field(None, description="false if missing")

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        self._read_first_stage(len(self.texts))
        return self

    @property
    def lists(self) -> list[tuple[str, Sequence[str]]]:
        return [(self.query, self.texts)]

    def answer(self, scored: Scored) -> list[dict[str, Any]]:
        return tei_answer(scored, self.top_n, self.texts if self.return_text else None)


class ScoreRequest(Request):
    """vLLM's form of /score: a text against one or many, or as many against as many."""

    other_texts = ("queries", "documents", "items", "data_1", "data_2")

    text_1: OneOrMore = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))
    text_2: OneOrMore = Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is scored, in this order.

        Raises:
            ValueError: if there are several queries and not as many documents.
        """
        queries, documents = self.text_1, self.text_2
        if len(queries) == 1:
            queries = queries * len(documents)
        if len(queries) != len(documents):
            raise ValueError(f"{len(queries)} texts against {len(documents)}: give one, or as many")
        return list(zip(queries, documents, strict=True))

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if not self.pairs:
            raise ValueError("there are no texts")
        if self.min_score is not None:
            raise ValueError("min_score leaves results out of a ranking; /score answers every pair")
        if given := [name for name in FUSION_FIELDS if getattr(self, name) is not None]:
            raise ValueError(f"{' and '.join(given)} change the order of a ranking; /score answers every pair")
        return self

    @property
    def lists(self) -> list[tuple[str, Sequence[str]]]:
        return [(query, [text for _, text in pairs]) for query, pairs in groupby(self.pairs, key=lambda pair: pair[0])]

    def answer(self, scored: Scored) -> dict[str, Any]:
        return vllm_scores(scored)


def _ranked_text(number: int, document: str | Mapping[str, Any], fields: Sequence[str]) -> str:
    """The text of a document; a string is an object with a `text`.

    Raises:
        ValueError: if it lacks a field, one is no string, or it holds a number that no answer could hold.
    """
    values = {"text": document} if isinstance(document, str) else document
    for field in fields:
        if not isinstance(values.get(field), str):
            raise ValueError(
                f"documents.{number}: a document is a string or an object with a string {field!r:.40}, got the keys "
                f"{[*values][:5]!s:.200}"
            )
    if not isinstance(document, str):
        json.dumps(document, allow_nan=False)
    return "\n".join(values[field] for field in fields)


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


def _form(body: Any) -> str | None:
    """Which form a body has; None is not an object."""
    return ("texts" if body.get("texts") is not None else "documents") if isinstance(body, dict) else None


AnyRerank = Annotated[
    Annotated[DocumentsRequest, Tag("documents")] | Annotated[TextsRequest, Tag("texts")], Discriminator(_form)
]
RERANK: TypeAdapter[DocumentsRequest | TextsRequest] = TypeAdapter(AnyRerank)
SCORE: TypeAdapter[ScoreRequest] = TypeAdapter(ScoreRequest)


def parse(body: bytes, form: TypeAdapter[T]) -> T:
    """Read a request.

    Raises:
        ValueError: naming the first things that are wrong and where they stand.
    """
    try:
        return form.validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[:5]
        places = [problem["loc"][1:] if form is RERANK else problem["loc"] for problem in found]
        wrong = [
            ".".join(map(str, ["body", *place])) + f": {problem['msg']}"
            for place, problem in zip(places, found, strict=True)
        ]
        raise ValueError("; ".join(wrong)) from error


RERANK_SCHEMA = {"anyOf": [form.model_json_schema() for form in (DocumentsRequest, TextsRequest)]}
SCORE_SCHEMA = ScoreRequest.model_json_schema()
