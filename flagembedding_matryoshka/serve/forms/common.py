"""What requests of all clients share: fields, and the scores that an answer is made of."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PrivateAttr,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import NotRequired, Self, TypedDict

from flagembedding_matryoshka.inference.fusion import as_first_stage, reciprocal_ranks
from flagembedding_matryoshka.inference.inputs import Passage
from flagembedding_matryoshka.inference.options import CALIBRATED
from flagembedding_matryoshka.inference.scoring import Hit, best_first
from flagembedding_matryoshka.serve.truncation import Lengths

SETTING = ("cutoff_layers", "compress_layers", "compress_ratio", "cascade")
FUSION_FIELDS = ("first_stage_scores", "first_stage", "fusion")
NOT_TO_MISSPELL = (*SETTING, "deadline_ms", "instruction", "min_score", *FUSION_FIELDS)
"""Fields whose misspelling would change the ranking: a similar unknown name is refused."""
MAX_UNKNOWN_FIELDS = 100
MAX_LAYERS = 1000
"""Most numbers in a list of layers, far more than models have."""
MAX_DOCUMENTS = "max_documents"
"""Name of the limit in the context of the validation."""
MAX_FUSION = 1e6
"""The highest weight of a request. At far lower weights the model's scores no longer change the order."""
FIRST_STAGE_SCORE = "first_stage_score"
"""The field of a document that is an object, with its first-stage score."""
HIT_FIELDS = ("cutoff_layer", "chunk", "is_truncated", "first_stage_score", "fused_score")
"""Fields of a hit that an answer repeats."""
GAP = 0.1
"""Distance between the lowest fused score of an exit and the lowered scores of the next shallower one."""


def _as_flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _check_chat_template_kwargs(values: dict[str, Any]) -> dict[str, str | None]:
    if others := [name for name in values if name != "instruction"]:
        raise ValueError(f"the only key allowed is 'instruction', got {others!s:.200}")
    if not isinstance(values.get("instruction"), str | None):
        raise ValueError(f"the instruction must be a string, got {values['instruction']!r:.80}")
    return values


Flag = Annotated[bool, BeforeValidator(_as_flag)]
"""A boolean, or "true" or "false", which some clients send."""
Normalize = Flag | Literal["calibrated"]
Number = Annotated[float, Field(allow_inf_nan=False)]
Side = Annotated[Literal["left", "right"], BeforeValidator(lambda side: side.lower() if type(side) is str else side)]
Cascade = Annotated[
    dict[int, float],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[1-9][0-9]*$"},
            "additionalProperties": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        }
    ),
]
ChatTemplateKwargs = Annotated[
    dict[str, Any],
    AfterValidator(_check_chat_template_kwargs),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {"instruction": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
            "additionalProperties": False,
        }
    ),
]
Weight = Annotated[float, Field(ge=0, le=MAX_FUSION, allow_inf_nan=False)] | Literal["auto"]
FirstStageScores = Annotated[list[Number | None], Field(fail_fast=True)]
Document = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {FIRST_STAGE_SCORE: {"anyOf": [{"type": "number"}, {"type": "null"}]}},
            "additionalProperties": True,
        }
    ),
]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Layers = Annotated[list[int], Field(max_length=MAX_LAYERS, fail_fast=True)]
Texts = Annotated[list[str], FailFast()]
OneOrMore = Annotated[
    Texts,
    BeforeValidator(lambda texts: [texts] if isinstance(texts, str) else texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
Scale = Callable[[float, int], float]
"""Turns a raw score that was read at an exit into the score that an answer shows."""


class ChunkSpan(TypedDict):
    """The characters of a document that its best chunk covers: from `start`, up to but without `end`."""

    start: int
    end: int


class Result(TypedDict, total=False):
    """Fields that a result of any form may have."""

    cutoff_layer: int
    chunk: ChunkSpan
    is_truncated: Literal[True]


class RankedResult(Result, total=False):
    """Fields that a result of a ranking may have."""

    model_score: float
    first_stage_score: float
    fused_score: float


class Usage(TypedDict):
    """Tokens that were read, and the floating-point operations if the request asks for them."""

    prompt_tokens: int
    total_tokens: int
    operations: NotRequired[int]


class QueryDocuments(NamedTuple):
    """A query of a request, with its documents.

    Attributes:
        query: the text.
        documents: texts, or ids of stored passages.
        instruction: instruction of the query; None is the model's own, "" is none.
        first_stage: the first stage's score of each document; None without such scores.
        place: the query's place in a body with several, for errors.
    """

    query: str
    documents: Sequence[str | Passage]
    instruction: str | None
    first_stage: Sequence[float] | None = None
    place: str | None = None


class Request(BaseModel):
    """Fields of all forms. Null means the same as a missing field: the server's default.

    Of unknown fields only the names are kept.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    other_texts: ClassVar[tuple[str, ...]] = ()
    """Names of the texts in other forms."""

    model: str | None = Field(None, description="does nothing: the server has one model")
    cutoff_layers: int | Layers | None = Field(None, description="the exit to score at")
    compress_layers: int | Layers | None = Field(None, description="layers after which passages are compressed")
    compress_ratio: int | None = Field(None, description="1 (off), 2, 4 or 8")
    cascade: Cascade | None = Field(None, description="{exit: share of all documents that goes deeper}")
    deadline_ms: Milliseconds | None = Field(
        None,
        description="milliseconds from the request's arrival. Until then documents go deeper, the most promising "
        "first. A result's cutoff_layer is the exit that it reached",
    )
    instruction: str | None = Field(
        None,
        description="the task, for a model whose template has a place for it. Default: the model's own instruction. "
        "An empty string is no instruction",
    )
    instruct: str | None = Field(None, description="SGLang's name of instruction")
    chat_template_kwargs: ChatTemplateKwargs | None = Field(
        None, description="an object with vLLM's place for instruction, and no other key"
    )
    min_score: Number | None = Field(
        None,
        description="leave out results with a lower score. Not with a cascade or a deadline, unless normalize is "
        '"calibrated". With first-stage scores it is compared with model_score',
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
        description="the weight of the first stage's scores; \"auto\" is the weight in the model's plan. Default: the "
        "server's --fusion, or with its --budget or --quality the plan's weight",
    )
    normalize: Normalize | None = Field(
        None,
        description='true (default): the sigmoid of scores. false: raw scores. "calibrated": the probability of '
        "relevance by the model's plan",
    )
    raw_scores: Flag | None = Field(None, description="true: scores without their sigmoid")
    use_activation: Flag | None = Field(None, description="vLLM's opposite of raw_scores")
    truncate: Flag | None = Field(
        None, description="false: refuse texts that are too long. true (default): truncate them"
    )
    truncation: Flag | None = Field(None, description="Voyage's name of truncate")
    truncation_direction: Side | None = Field(
        None, description="Right (default): documents lose their end. Left: documents lose their beginning"
    )
    truncation_side: Side | None = Field(None, description="vLLM's name of truncation_direction")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="most tokens of query, document and prompt together; -1 is the server's own limit"
    )
    max_tokens_per_doc: int | None = Field(None, ge=1, description="most tokens of a document")
    max_tokens_per_query: int | None = Field(None, ge=1, description="most tokens of the query")
    priority: Literal[0] | None = Field(
        None, description="vLLM's order of requests, of which only 0 is allowed: all requests have the same priority"
    )
    _unknown: set[str] = PrivateAttr(default_factory=set)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        unknown = self.model_extra or {}
        if len(unknown) > MAX_UNKNOWN_FIELDS:
            raise ValueError(f"{len(unknown)} fields are unknown, more than {MAX_UNKNOWN_FIELDS}")
        for name, value in unknown.items():
            if name in self.other_texts and value is not None:
                raise ValueError(f"there are texts in {name!r}, too; give one list of them")
            if close := get_close_matches(name[:40], NOT_TO_MISSPELL, 1, 0.8):
                raise ValueError(f"{name!r:.40} is unknown: do you mean {close[0]!r}?")
        self._unknown = {name[:40] for name, value in unknown.items() if value is not None}
        unknown.clear()
        if None not in (self.truncation_direction, self.truncation_side):
            raise ValueError("truncation_direction and truncation_side are one option with two names: give one of them")
        if len(set(self._instructions.values())) > 1:
            raise ValueError(f"{' and '.join(self._instructions)} are one option with several names, and differ")
        if self.normalize is not None and not {self.raw_scores, self.use_activation} <= {None}:
            raise ValueError("normalize and raw_scores or use_activation are one option: give one of them")
        return self

    @property
    def _instructions(self) -> dict[str, str]:
        """The instruction under each name that the request uses."""
        in_kwargs = (self.chat_template_kwargs or {}).get("instruction")
        names = ("instruction", "instruct", "chat_template_kwargs.instruction")
        found = zip(names, (self.instruction, self.instruct, in_kwargs), strict=True)
        return {name: text for name, text in found if text is not None}

    @property
    def any_instruction(self) -> str | None:
        """The instruction under any of its names; None is the model's own."""
        return next(iter(self._instructions.values()), None)

    @property
    def unknown_fields(self) -> set[str]:
        """Names of unknown fields that are not null, of each at most 40 characters."""
        return self._unknown

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the request's values hold."""
        return sum(map(sys.getsizeof, chain(vars(self).values(), self._held_texts)))

    @property
    def _held_texts(self) -> Iterable[str]:
        """The texts in lists."""
        raise NotImplementedError

    def drop_texts(self) -> None:
        """Forget the texts that the answer does not repeat."""
        raise NotImplementedError

    def _refuse_more_documents(self, documents: int, info: ValidationInfo) -> None:
        """Raise ValueError if there are more documents than the context of the validation allows."""
        context: Any = info.context
        if documents > context[MAX_DOCUMENTS]:
            raise ValueError(f"{documents} documents are more than {context[MAX_DOCUMENTS]}")

    @property
    def setting(self) -> dict[str, Any]:
        """Keyword arguments of `MatryoshkaReranker.setting`."""
        return {name: getattr(self, name) for name in SETTING}

    @property
    def fixes_depth(self) -> bool:
        """Whether the request names exits or a deadline, or a score whose meaning depends on the exit."""
        names_depth = (self.cutoff_layers, self.cascade, self.deadline_ms) != (None, None, None)
        return names_depth or self.min_score is not None or self.normalize == CALIBRATED

    @property
    def lengths(self) -> Lengths:
        """The most tokens of texts, and how texts are truncated."""
        return Lengths(
            query=self.max_tokens_per_query,
            document=self.max_tokens_per_doc,
            pair=None if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens,
            keep_end="left" in (self.truncation_direction, self.truncation_side),
            refuse=False in (self.truncate, self.truncation),
        )

    @property
    def chunks(self) -> dict[str, Any] | None:
        """Keyword arguments of `MatryoshkaReranker.cut_chunks`; None: documents are not cut into chunks."""
        return None

    @property
    def normalizer(self) -> dict[str, Any]:
        """Keyword arguments of `MatryoshkaReranker.normalizer`: which scores the answer shows."""
        normalize = not (self.raw_scores or self.use_activation is False) if self.normalize is None else self.normalize
        return {"normalize": normalize, "min_score": self.min_score}

    def _read_first_stage(
        self, documents: int, scores: Sequence[float | None] | None, own: Sequence[float | None] | None = None
    ) -> list[float] | None:
        """Return the first stage's score of each document of a query; None if the request gives none.

        Args:
            documents: number of documents.
            scores: the query's `first_stage_scores`.
            own: scores in the documents; None if no document has one.

        Raises:
            ValueError: if scores are given in several ways, their number is not that of documents, or a weight is given
                without scores.
        """
        ways = {
            "first_stage_scores": scores,
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
            return reciprocal_ranks(documents)
        values = scores if own is None else own
        if values is not None and len(values) != documents:
            raise ValueError(f"first_stage_scores: {len(values)} scores for {documents} documents")
        return None if values is None else as_first_stage(0, values, documents)

    @property
    def counts_operations(self) -> bool:
        """Whether the answer has the number of floating-point operations."""
        return False

    @property
    def lists(self) -> list[QueryDocuments]:
        """Each query with its documents, in the order of the answer."""
        raise NotImplementedError

    def answer(self, scores: RequestScores) -> Any:
        """Return the answer in the form of the request."""
        raise NotImplementedError


@dataclass(frozen=True)
class RequestScores:
    """The scores of a request.

    Attributes:
        hits_of_queries: for each query the hit of each document, as `MatryoshkaReranker.rank` returns it, not
            normalised.
        tokens: number of tokens that were read for the request.
        model: name of the model.
        scale: turns raw scores into the scores that the answer shows.
        depth: exit of hits that name none.
        min_score: hits that would show a lower score are left out; None leaves out none.
        operations: number of floating-point operations; None if they are not asked for.
        fusion: weight of the first stage's scores; None if the hits have no fused scores.
        is_raw: whether the answer has raw scores.
    """

    hits_of_queries: Sequence[Sequence[Hit]]
    tokens: int
    model: str
    scale: Scale
    depth: int
    min_score: float | None = None
    operations: int | None = None
    fusion: float | None = None
    is_raw: bool = False

    @cached_property
    def hits(self) -> Sequence[Hit]:
        """The hits of all queries."""
        return list(chain.from_iterable(self.hits_of_queries))

    @property
    def of_queries(self) -> list[RequestScores]:
        """The scores of each query alone."""
        return [replace(self, hits_of_queries=[hits]) for hits in self.hits_of_queries]

    def best(self, name: str, count: int | None) -> list[Any]:
        """Return the best documents of all queries, best first; documents of deeper exits rank first.

        Args:
            name: field of the score.
            count: number of documents to return at most; None is all. Documents that `min_score` leaves out do not
                count.

        Returns:
            For each document "index", the score under `name` and the fields of HIT_FIELDS that it has. Fused hits have
            a score under `name` that falls with the rank, because clients sort by it. Their "model_score" is the
            model's own score, which `min_score` is compared with.
        """
        fused = None if self.fusion is None else self._fused_shown(self.fusion)
        found: list[dict[str, Any]] = []
        for index in best_first(self.hits):
            if len(found) == count:
                break
            hit = self.hits[index]
            own = self.scale(hit["score"], hit.get("cutoff_layer", self.depth))
            if self.min_score is not None and own < self.min_score:
                continue
            shown = {name: own} if fused is None else {name: fused[index], "model_score": own}
            found.append({"index": index} | shown | {key: value for key, value in hit.items() if key in HIT_FIELDS})
        return found

    def _fused_shown(self, weight: float) -> list[float]:
        """Return the fused score of each hit, as the answer shows it.

        Fused scores of several exits are standard scores among different candidates. Scores of a shallower exit are
        lowered below those of all deeper exits. Unless scores are raw, the sigmoid of fused score / (1 + weight), the
        weighted mean of both standard scores, is returned: without the division a large weight would make it 1.
        """
        exits: dict[int, list[int]] = {}
        for place, hit in enumerate(self.hits):
            exits.setdefault(hit.get("cutoff_layer", self.depth), []).append(place)
        shown, floor = [0.0] * len(self.hits), math.inf
        for _, places in sorted(exits.items(), reverse=True):
            fused = [self.hits[place]["fused_score"] for place in places]
            lowered = min(0.0, floor - GAP - max(fused))
            floor = min(fused) + lowered
            for place, score in zip(places, fused, strict=True):
                shown[place] = score + lowered
        return shown if self.is_raw else [sigmoid(score / (1 + weight)) for score in shown]

    @property
    def meta(self) -> dict[str, Any]:
        """Version and tokens, as in Cohere's answer."""
        return {"api_version": {"version": "2"}, "tokens": {"input_tokens": self.tokens, "output_tokens": 0}}

    @property
    def usage(self) -> Usage:
        """Tokens that were read, under the names of OpenAI's API, and the operations."""
        usage = Usage(prompt_tokens=self.tokens, total_tokens=self.tokens)
        if self.operations is not None:
            usage["operations"] = self.operations
        return usage


def sigmoid(score: float) -> float:
    """Compute the sigmoid in 64 bits, where it reaches 1 later than in 32."""
    small = math.exp(-abs(score))
    return (1 if score >= 0 else small) / (1 + small)
