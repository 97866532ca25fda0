"""The options of a call, resolved from the re-ranker's defaults and the call's arguments."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from flagembedding_matryoshka.inference.deadline import Deadline
from flagembedding_matryoshka.inference.fusion import as_fusion
from flagembedding_matryoshka.inference.inputs import Pairs, are_tokenized, as_count
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import Setting, resolve_alias
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair
from flagembedding_matryoshka.text.templates import Template

CALIBRATED = "calibrated"
"""The value of `normalize` for the probabilities of the plan's calibration."""
DEPTH_AND_WIDTH = ("cutoff_layers", "compress_layers", "compress_ratio")
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

    def template(self, tokenizer: PairTokenizer) -> Template:
        """Return the template of the call, with its words and instruction.

        Raises:
            TypeError: if the instruction is not text.
            ValueError: if the template has no place for it.
        """
        return self.saved_template(tokenizer).with_instruction(None)

    def saved_template(self, tokenizer: PairTokenizer) -> Template:
        """The template to save with a checkpoint, so that it is scored with these words; the instruction is its
        `instruction`.

        Raises:
            TypeError, ValueError: as `template`.
        """
        given: dict[str, Any] = {
            "query_instruction": self.query_instruction_for_rerank,
            "query_format": self.query_instruction_format,
            "passage_instruction": self.passage_instruction_for_rerank,
            "passage_format": self.passage_instruction_format,
            "prompt": self.prompt,
        }
        words = tokenizer.template
        changed: dict[str, Any] = {name: value for name, value in given.items() if value != getattr(words, name)}
        if changed:
            words = replace(words, **changed)
        if self.instruction is None:
            return words
        words.with_instruction(self.instruction)  # refuses one that it has no place for
        return replace(words, instruction=self.instruction)

    def tokenize(self, pairs: Sequence[tuple[str, str]], tokenizer: PairTokenizer) -> list[TokenizedPair]:
        """Tokenise pairs of query and passage.

        Raises:
            ValueError: if a query leaves no room for its passage.
        """
        return tokenizer.build_within(pairs, self.query_max_length, self.max_length, self.template(tokenizer))


@dataclass(frozen=True)
class RankingOptions:
    """Arguments of `MatryoshkaReranker.rank` for all queries of a call, apart from texts and first-stage scores.

    Attributes:
        top_k, return_documents, cascade, chunk, max_chunks_per_doc, overlap, min_score: as in `rank`.
        deadline: deadline of each query; None is no deadline.
        has_first_stage: whether the call gives first-stage scores or an order.
        overrides: the other arguments, as in `compute_score`, without a list of instructions.
    """

    top_k: int | None
    return_documents: bool
    cascade: Mapping[int, float] | None
    chunk: bool
    max_chunks_per_doc: int | None
    overlap: int
    deadline: Deadline | None
    min_score: float | None
    has_first_stage: bool
    overrides: Mapping[str, Any]


def refuse_beside_tokens(pairs: Pairs, overrides: Mapping[str, Any]) -> None:
    """Raise TypeError if a call says how texts become tokens and gives no texts."""
    given = {name: overrides[name] for name in OF_TEXTS if overrides.get(name) is not None}
    if given and are_tokenized(pairs):
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
    values = {name: value for name, value in values.items() if value != (1 if name == "compress_ratio" else None)}
    if values:
        raise ValueError(f"budget and quality choose depth and width themselves; leave out {values}.")


def resolve_call(defaults: Any, overrides: Mapping[str, Any]) -> tuple[ScoringOptions, Setting]:
    """Return the options and the setting of a call that does not rank.

    Args:
        defaults: a re-ranker.
        overrides: None keeps its default; `compress_layer` is the reference's spelling of `compress_layers`.

    Raises:
        TypeError, ValueError: as `ScoringOptions.resolve` and `Setting.resolve`, TypeError if `fusion` is given, and
            ValueError if the two spellings contradict each other.
    """
    if overrides.get("fusion") is not None:
        raise TypeError(
            f"fusion={overrides['fusion']!r} is an argument of rankings, which fuse a query's scores with those of the "
            "first stage: leave it out here."
        )
    return _resolve(defaults, overrides, None)


def _resolve(
    defaults: Any, overrides: Mapping[str, Any], cascade: Mapping[int, float] | None
) -> tuple[ScoringOptions, Setting]:
    """Return the options and the setting of any call, as `resolve_call`."""
    of_text = {name: value for name, value in overrides.items() if name not in DEPTH_AND_WIDTH}
    depth_and_width = {name: overrides.get(name) for name in DEPTH_AND_WIDTH}
    alias = of_text.pop("compress_layer", None)
    if alias is not None:
        depth_and_width["compress_layers"] = resolve_alias(alias, depth_and_width["compress_layers"])
    for name, value in depth_and_width.items():
        depth_and_width[name] = getattr(defaults, name) if value is None else value
    options = ScoringOptions.resolve(defaults, of_text)
    if overrides.get("max_length") is not None:
        refuse_beyond_positions(defaults.config, options.max_length)
    try:
        setting = Setting.resolve(defaults.config, **depth_and_width, cascade=cascade)
        is_given = alias is not None or overrides.get("compress_layers") is not None
        if is_given and setting.compress_ratio > 1 and setting.compress_layers[0] >= setting.depth:
            warnings.warn(
                f"compress_ratio={setting.compress_ratio} compresses nothing: compress_layers="
                f"{list(setting.compress_layers)} lie at or above the deepest cutoff, layer {setting.depth}.",
                UserWarning,
                stacklevel=4,
            )
        return options, setting
    except ValueError as error:
        if defaults.max_layer is None:
            raise
        raise ValueError(f"{error} Layers above max_layer={defaults.max_layer} were not loaded.") from error


def resolve_ranking(
    defaults: Any, overrides: Mapping[str, Any], cascade: Mapping[int, float] | None = None
) -> tuple[ScoringOptions, Setting]:
    """As `resolve_call`, for a ranking: by the plan, unless the call names a depth, width or cascade of its own.

    Raises:
        FileNotFoundError: as `ScoringOptions.resolve`.
        TypeError, ValueError: as `resolve_call`, except that `fusion` is allowed; ValueError if several cutoff layers
            are given.
    """
    own = any(overrides.get(name) is not None for name in (*DEPTH_AND_WIDTH, "compress_layer"))
    if defaults.planned is not None and cascade is None and not own:
        overrides, cascade = {**overrides, **defaults.planned.arguments}, dict(defaults.planned.cascade)
    options, setting = _resolve(defaults, overrides, cascade)
    if len(setting.cutoff_layers) > 1:
        raise ValueError(f"a ranking is made at one cutoff layer, got cutoff_layers={list(setting.cutoff_layers)}.")
    return options, setting
