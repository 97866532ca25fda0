"""The options of a call, resolved from the re-ranker's defaults and the call's arguments."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from flagembedding_matryoshka.inference.deadline import Deadline
from flagembedding_matryoshka.inference.fusion import as_fusion
from flagembedding_matryoshka.inference.inputs import Inputs, Pairs, as_count, excerpt
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import Setting, resolve_alias
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair
from flagembedding_matryoshka.text.templates import Template

CALIBRATED = "calibrated"
"""The value of `normalize` for the probabilities of the plan's calibration."""
DEPTH_AND_WIDTH = ("cutoff_layers", "compress_layers", "compress_ratio", "store_layer")
OF_TEXTS = (
    "query_instruction_for_rerank",
    "query_instruction_format",
    "passage_instruction_for_rerank",
    "passage_instruction_format",
    "instruction",
    "prompt",
    "query_max_length",
    "max_length",
)


@dataclass(frozen=True)
class ScoringOptions:
    """Options of building, scoring and ranking pairs, named as in the re-ranker's constructor.

    Attributes:
        fusion: weight of the first stage's scores in a ranking that has such scores; None is no weight.
    """

    query_instruction_for_rerank: str
    query_instruction_format: str
    passage_instruction_for_rerank: str
    passage_instruction_format: str
    instruction: str | None
    prompt: str
    batch_size: int
    max_tokens_per_batch: int
    query_max_length: int | None
    max_length: int
    normalize: bool | str
    fusion: float | None

    @classmethod
    def resolve(cls, defaults: Any, overrides: Mapping[str, Any]) -> ScoringOptions:
        """Return the attributes of `defaults` with `overrides`. None as an override keeps the default.

        Raises:
            FileNotFoundError: if `fusion` is "auto", and the model has no plan.
            TypeError: if an override is unknown, a size is not an int, or `fusion` is not a number.
            ValueError: if a size is less than 1, `normalize` has an unknown value, `fusion` is negative or not finite,
                or `fusion` is "auto" and the plan has no weight.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(overrides) - set(names))
        if unknown:
            raise TypeError(f"unknown arguments {unknown}; a call may override {[*DEPTH_AND_WIDTH, *names]}.")
        chosen = {name: getattr(defaults, name) if overrides.get(name) is None else overrides[name] for name in names}
        for name in ("query_instruction_format", "passage_instruction_format"):
            if isinstance(overrides.get(name), str):  # as `Template.replaced`
                chosen[name] = chosen[name].replace("\\n", "\n")
        for name in ("batch_size", "max_tokens_per_batch", "max_length", "query_max_length"):
            if chosen[name] is not None:
                chosen[name] = as_count(name, chosen[name])
        if chosen["normalize"] not in (True, False, CALIBRATED):
            raise ValueError(f"normalize is {chosen['normalize']!r}, but must be True, False or {CALIBRATED!r}.")
        if chosen["fusion"] is not None:
            chosen["fusion"] = as_fusion(chosen["fusion"], lambda: defaults.plan.fusion_weight())
        return cls(**chosen)


@dataclass(frozen=True)
class Call:
    """The options of a call, for all of its pairs.

    Attributes:
        shares: number of devices that the work is split among.
        is_cascade: whether a cascade or a deadline chooses the candidates that go deeper.
        deadline: deadline of each list; it starts when the list is computed, unless it has started; None is none.
        fusion: weight of the first stage's scores, which all lists then have; None is no fusion.
        max_tokens: tokens of a pair, at most, that the model has positions for; None is no limit.
        saved_template: the template to save with a checkpoint, so that it is scored with the words of the call. The
            instruction of the call is its `instruction`.
        template: the same template, with the instruction in its place.

    Raises:
        TypeError: if the instruction is not text.
        ValueError: if the template has no place for it.
    """

    tokenizer: PairTokenizer
    options: ScoringOptions
    setting: Setting
    shares: int = 1
    is_cascade: bool = False
    deadline: Deadline | None = None
    fusion: float | None = None
    max_tokens: int | None = None
    saved_template: Template = field(init=False)
    template: Template = field(init=False)

    def __post_init__(self) -> None:
        template, options = self.tokenizer.template, self.options
        given: dict[str, Any] = {
            "query_instruction": options.query_instruction_for_rerank,
            "query_format": options.query_instruction_format,
            "passage_instruction": options.passage_instruction_for_rerank,
            "passage_format": options.passage_instruction_format,
            "prompt": options.prompt,
        }
        changed = {name: value for name, value in given.items() if value != getattr(template, name)}
        if changed:
            template = replace(template, **changed)
        if options.instruction is not None:
            template.with_instruction(options.instruction)  # refuses one that it has no place for
            template = replace(template, instruction=options.instruction)
        object.__setattr__(self, "saved_template", template)
        if template.instruction:
            template = template.with_instruction(None)
        object.__setattr__(self, "template", template)

    def tokenize(self, pairs: Pairs, first: int = 0) -> Inputs:
        """Tokenise pairs. Pairs that are tokenised already stay as they are.

        Args:
            first: number of the first pair in the call, for the error.

        Raises:
            ValueError: if a query leaves no room for its passage, or a pair has more than `max_tokens`.
        """
        inputs: Any = pairs
        if not pairs or not isinstance(pairs[0], TokenizedPair):
            lengths = self.tokenizer.lengths_within(
                self.options.query_max_length, self.options.max_length, self.template, self.setting.store_layer > 0
            )
            inputs = self.tokenizer.build(inputs, *lengths, self.template)
        if self.max_tokens is not None:
            for number, pair in enumerate(inputs, start=first):
                if pair.length > self.max_tokens:
                    raise ValueError(
                        f"pair {number} has {pair.length} tokens, the template's words among them, and the model has "
                        f"{self.max_tokens} positions. Use a smaller max_length."
                    )
        return inputs


@dataclass(frozen=True)
class RankingOptions:
    """Arguments of `MatryoshkaReranker.rank` for all queries of a call, without the texts and first-stage scores.

    Attributes:
        top_k, return_documents, cascade, chunk, max_chunks_per_doc, overlap, min_score: as in `rank`.
        deadline: deadline of each query; None is no deadline.
        has_first_stage: whether the call gives first-stage scores or an order.
        instructions: an instruction, or None, for each query; None if the call gives at most one instruction.
        overrides: the other arguments, as in `compute_score`.
    """

    top_k: int | None
    return_documents: bool
    cascade: Mapping[int, float] | None
    chunk: bool
    max_chunks_per_doc: int | None
    overlap: int
    min_score: float | None
    deadline: Deadline | None
    has_first_stage: bool
    instructions: Sequence[str | None] | None
    overrides: Mapping[str, Any]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], clock: Callable[[], float]) -> RankingOptions:
        """Return the options among the arguments of `rank_batch` or `rank_iter`, by name.

        Args:
            clock: the clock of the deadline.

        Raises:
            TypeError: if `top_k` or a number of chunks is not an int, `deadline_ms` is not a number, the instructions
                are not in a list, or one of them is neither a string nor None.
            ValueError: if a number is too small, or an argument of chunks is given without `chunk`.
        """
        chosen = {one.name: arguments[one.name] for one in fields(cls) if one.name in arguments}
        if chosen["top_k"] is not None:
            chosen["top_k"] = as_count("top_k", chosen["top_k"], ", or None for all documents")
        chosen["max_chunks_per_doc"], chosen["overlap"] = as_chunks(
            chosen["chunk"], chosen["max_chunks_per_doc"], chosen["overlap"]
        )
        deadline_ms = arguments["deadline_ms"]
        chosen["deadline"] = None if deadline_ms is None else Deadline.of(deadline_ms, clock)
        first_stage = (arguments["first_stage_scores"], arguments["first_stage"])
        chosen["has_first_stage"] = any(one is not None for one in first_stage)
        given = chosen["overrides"].get("instruction")
        chosen["instructions"] = None
        if given is not None and not isinstance(given, str):
            if not isinstance(given, list | tuple):
                raise TypeError(
                    f"instruction must be a string, or a list with one for each query, got {excerpt(given)}."
                )
            for number, one in enumerate(given):
                if not isinstance(one, str | None):
                    raise TypeError(f"instruction {number} must be a string or None, got {excerpt(one)}.")
            chosen["instructions"], chosen["overrides"] = given, chosen["overrides"] | {"instruction": None}
        return cls(**chosen)


def as_chunks(chunk: bool, max_chunks_per_doc: Any, overlap: Any) -> tuple[int | None, int]:
    """Return `max_chunks_per_doc` and `overlap` of a ranking, arguments of `MatryoshkaReranker.rank`.

    Raises:
        TypeError: if a number is not an int.
        ValueError: if a number is too small, or given without `chunk`.
    """
    for name, value in (("max_chunks_per_doc", max_chunks_per_doc), ("overlap", overlap)):
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise TypeError(f"{name} must be an int, got {value!r}.")
    most = None if max_chunks_per_doc is None else operator.index(max_chunks_per_doc)
    overlap = 0 if overlap is None else operator.index(overlap)
    if most is not None and most < 1:
        raise ValueError(f"max_chunks_per_doc is {most}, but must be at least 1, or None for all.")
    if overlap < 0:
        raise ValueError(f"overlap is {overlap}, but must be at least 0.")
    if not chunk and (most is not None or overlap):
        raise ValueError(f"max_chunks_per_doc={most} and overlap={overlap} need chunk=True.")
    return most, overlap


def refuse_beside_tokens(overrides: Mapping[str, Any]) -> None:
    """Raise TypeError if a call with tokenised pairs gives options of tokenisation."""
    given = {name: overrides[name] for name in OF_TEXTS if overrides.get(name) is not None}
    if given:
        raise TypeError(f"the pairs are tokenised already; {given} goes to tokenize.")


def ranking_weight(options: ScoringOptions, overrides: Mapping[str, Any], has_first_stage: bool) -> float | None:
    """Return the weight of the first stage's scores in a ranking; None without such scores.

    Args:
        options: options of the call, with `overrides`.
        overrides: arguments of the call.
        has_first_stage: whether the call gives first-stage scores or an order.

    Raises:
        ValueError: if the call gives such scores without a weight, or a weight without scores.
    """
    if not has_first_stage and overrides.get("fusion") is not None:
        raise ValueError(
            f"fusion={overrides['fusion']!r} needs the first stage's scores: give first_stage_scores, or "
            "first_stage='order' for documents in its order."
        )
    if has_first_stage and options.fusion is None:
        raise ValueError(
            "first_stage_scores and first_stage need a weight: give fusion=, a number of at least 0, or 'auto' for the "
            "weight in the model's plan, which an evaluation with --fusion --write_plan chooses."
        )
    return options.fusion if has_first_stage else None


def refuse_beyond_positions(config: CostWiseConfig, max_length: int) -> None:
    """Raise ValueError if a given `max_length` is more than the positions that the model knows."""
    if max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length is {max_length}, but must be at most the model's "
            f"max_position_embeddings={config.max_position_embeddings}."
        )


def refuse_beside_plan(given: Any) -> None:
    """Raise ValueError if a re-ranker was given a depth or width beside a plan that chooses them."""
    values = {name: getattr(given, name) for name in (*DEPTH_AND_WIDTH, "max_layer")}
    unset = {"compress_ratio": 1, "store_layer": 0}
    values = {name: value for name, value in values.items() if value != unset.get(name)}
    if values:
        raise ValueError(f"budget and quality choose depth and width themselves; leave out {values}.")


def resolve_call(
    defaults: Any,
    overrides: Mapping[str, Any],
    cascade: Mapping[int, float] | None = None,
    is_ranking: bool = False,
) -> tuple[ScoringOptions, Setting]:
    """Return the options and the setting of a call.

    Args:
        defaults: a re-ranker.
        overrides: None keeps its default; `compress_layer` is the reference's spelling of `compress_layers`.
        is_ranking: whether the call ranks. It then uses the setting of the re-ranker's plan, unless it names a depth,
            width or cascade of its own.

    Raises:
        FileNotFoundError: as `ScoringOptions.resolve`.
        TypeError, ValueError: as `ScoringOptions.resolve` and `Setting.resolve`. ValueError if the two spellings
            contradict each other, or a ranking has several cutoff layers. TypeError if `fusion` is given without a
            ranking.
    """
    if not is_ranking and overrides.get("fusion") is not None:
        raise TypeError(
            f"fusion={overrides['fusion']!r} is an argument of rankings, which fuse a query's scores with those of the "
            "first stage: leave it out here."
        )
    own = any(overrides.get(name) is not None for name in (*DEPTH_AND_WIDTH, "compress_layer"))
    if is_ranking and defaults.planned is not None and cascade is None and not own:
        overrides, cascade = {**overrides, **defaults.planned.arguments}, dict(defaults.planned.cascade)
    others = {name: value for name, value in overrides.items() if name not in DEPTH_AND_WIDTH}
    depth_and_width = {name: overrides.get(name) for name in DEPTH_AND_WIDTH}
    alias = others.pop("compress_layer", None)
    if alias is not None:
        depth_and_width["compress_layers"] = resolve_alias(alias, depth_and_width["compress_layers"])
    for name, value in depth_and_width.items():
        depth_and_width[name] = getattr(defaults, name) if value is None else value
    options = ScoringOptions.resolve(defaults, others)
    try:
        # Before the weights are read, the configuration tells the exits.
        setting = Setting.resolve(defaults.model or defaults.config, **depth_and_width, cascade=cascade)
    except ValueError as error:
        if defaults.max_layer is None:
            raise
        raise ValueError(f"{error} Layers above max_layer={defaults.max_layer} were not loaded.") from error
    is_given = alias is not None or overrides.get("compress_layers") is not None
    if is_given and setting.compress_ratio > 1 and setting.compress_layers[0] >= setting.depth:
        warnings.warn(
            f"compress_ratio={setting.compress_ratio} compresses nothing: compress_layers="
            f"{list(setting.compress_layers)} lie at or above the deepest cutoff, layer {setting.depth}.",
            UserWarning,
            stacklevel=3,
        )
    if is_ranking and len(setting.cutoff_layers) > 1:
        raise ValueError(f"a ranking is made at one cutoff layer, got cutoff_layers={list(setting.cutoff_layers)}.")
    return options, setting
