"""The common part of the integrations: loading, ranking, first-stage scores, and saving as arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import signature
from numbers import Real
from os import PathLike
from typing import Any

import torch

from flagembedding_matryoshka.inference.fusion import ORDER, as_first_stage
from flagembedding_matryoshka.inference.inputs import excerpt
from flagembedding_matryoshka.inference.options import DEPTH_AND_WIDTH, ScoringOptions
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.setting import as_stages

OF_LOADING = {"device", *signature(MatryoshkaReranker).parameters} - {"model_name_or_path"}
OF_RANKING = {
    *("cascade", "compress_layer", "deadline_ms", "min_score", "show_progress_bar"),
    *DEPTH_AND_WIDTH,
    *(field.name for field in fields(ScoringOptions)),
}
NONE = "none"
"""The value of `first_stage` that turns fusion off."""
RERANKER_SCORE = "reranker_score"
FIRST_STAGE_SCORE = "first_stage_score"
FIRST_STAGE_ARGUMENTS = ("first_stage_scores", "first_stage")


@dataclass(frozen=True)
class TextHit:
    """A text in a ranking.

    Attributes:
        index: index of the text in the call.
        score: the fused score, or without fusion the re-ranker's. Texts of one exit are ordered by it.
        metadata: with fusion the re-ranker's and the first stage's score; empty without fusion.
        cutoff_layer: exit where the score was read; None without a cascade or a deadline.
    """

    index: int
    score: float
    metadata: dict[str, float]
    cutoff_layer: int | None


class RankingAdapter:
    """A re-ranker with the options of its rankings. It can be pickled if it is made from a path.

    Args:
        reranker: a re-ranker, or the path of one, which `load` loads.
        meta_fields_to_embed: names of metadata to write before each text that has them.
        embedding_separator: separator between metadata and text.
        score_threshold: another name of `min_score`: texts with a lower score of the re-ranker are left out, also with
            fusion. In a cascade or with a deadline it needs `normalize="calibrated"`, because other scores of several
            exits cannot be compared.
        first_stage_key: name of the metadata that holds the first stage's scores, where higher is better. None is the
            library's own field for scores, if it has one.
        first_stage: "order" uses the order of the texts as the first stage's ranking. "none" is no fusion, even if the
            re-ranker has a default weight. None uses the texts' scores if a text has a score and there is a weight: the
            option `fusion`, or the re-ranker's default, which may be that of its plan.
        options: arguments of `MatryoshkaReranker.rank`: `cutoff_layers`, `compress_layers`, `compress_ratio`,
            `cascade`, `normalize`, `instruction`, `min_score`, `fusion`, …; with a path also arguments of its
            constructor: `devices` (or `device`), `dtype`, `budget`, `token`, `revision`, … None keeps a default.

    Attributes:
        given: the options in a form that can be saved.
        options: the options that each call of `rank` gets.

    Raises:
        TypeError: if an option is unknown, or an option of loading is given with a loaded re-ranker.
        ValueError: if `min_score` is not a number; if it or a device is given under two names; or if `first_stage` has
            another value or contradicts `first_stage_key` or `fusion`.
    """

    def __init__(
        self,
        reranker: MatryoshkaReranker | str | PathLike[str],
        meta_fields_to_embed: Sequence[str] | None = None,
        embedding_separator: str = "\n",
        score_threshold: float | None = None,
        first_stage_key: str | None = None,
        first_stage: str | None = None,
        **options: Any,
    ) -> None:
        given = {name: _plain(name, value) for name, value in options.items() if value is not None}
        if unknown := sorted(given.keys() - OF_LOADING - OF_RANKING):
            raise TypeError(f"unknown arguments {unknown}: allowed are {sorted(OF_LOADING | OF_RANKING)}.")
        is_path = isinstance(reranker, str | PathLike)
        if not is_path and (of_loading := sorted(given.keys() - OF_RANKING)):
            raise TypeError(
                f"{of_loading} are options of loading, and this re-ranker is loaded: give its path instead."
            )
        if isinstance(meta_fields_to_embed, str):
            raise TypeError(f"meta_fields_to_embed must be a list of names, got the string {meta_fields_to_embed!r}.")
        if "device" in given and "devices" in given:
            raise ValueError(f"device={given['device']!r} and devices={given['devices']!r}: give one of them.")
        _check_first_stage(first_stage, given.get("fusion"), first_stage_key=first_stage_key)
        self.first_stage_key = first_stage_key
        self.first_stage = first_stage
        self.min_score = _least(score_threshold, given.pop("min_score", None))
        self.meta_fields_to_embed = list(meta_fields_to_embed or ())
        self.embedding_separator = embedding_separator
        self.given = given
        self._path = str(reranker) if isinstance(reranker, str | PathLike) else None
        self._reranker = None if isinstance(reranker, str | PathLike) else reranker
        self.options = {name: value for name, value in given.items() if not is_path or name not in OF_LOADING}

    def load(self) -> MatryoshkaReranker:
        """Return the re-ranker, which the first call loads.

        Raises:
            TypeError, ValueError: if the options do not fit it.
        """
        if self._reranker is None:
            assert self._path is not None
            given = {name: value for name, value in self.given.items() if name in OF_LOADING}
            if "device" in given:
                given["devices"] = given.pop("device")
            if hasattr(given.get("token"), "resolve_value"):  # Haystack's secrets
                given["token"] = given["token"].resolve_value()
            self._reranker = MatryoshkaReranker(self._path, **given)
        return self._reranker

    def check(self, top_k: int | None = None, has_scores: bool = True) -> None:
        """Load the re-ranker, and raise the errors that a call would raise with these options.

        Args:
            top_k: as in a call.
            has_scores: whether the library's texts have a field for scores.
        """
        self._rank("", [], [], [] if has_scores else None, top_k, self.min_score, {})

    def __call__(
        self,
        query: str,
        contents: Sequence[str | None],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        top_k: int | None = None,
        score_threshold: float | None = None,
        scores: Sequence[float | None] | None = None,
        **overrides: Any,
    ) -> list[TextHit]:
        """Rank texts, best first.

        Args:
            contents: the texts; None is a text with metadata alone.
            metadata: metadata of each text.
            top_k: number of hits to return at most; None is all hits.
            score_threshold: the lowest score; None keeps the adapter's own.
            scores: score of each text in the library's own field; None if the library has no such field.
            overrides: arguments of `MatryoshkaReranker.rank`, also `first_stage_scores` and `first_stage`; None keeps
                the adapter's own.

        Raises:
            TypeError, ValueError: as `MatryoshkaReranker.rank`; and ValueError if `fusion` or `first_stage_key` is
                given, but no text has a first-stage score.
        """
        own = _least(score_threshold, overrides.pop("min_score", None))
        described = self._described(contents, metadata)
        texts = [self._text(content, found) for content, found in described]
        given = {name: value for name, value in overrides.items() if value is not None}
        least = self.min_score if own is None else own
        return self._rank(query, texts, [found for _, found in described], scores, top_k, least, given)

    def _rank(
        self,
        query: str,
        texts: Sequence[Any],
        metadata: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None] | None,
        top_k: int | None,
        least: float | None,
        overrides: Mapping[str, Any],
    ) -> list[TextHit]:
        of_first_stage = self._first_stage_of(texts, metadata, scores, overrides)
        options = self.options | {name: value for name, value in overrides.items() if name not in FIRST_STAGE_ARGUMENTS}
        if not of_first_stage:
            options.pop("fusion", None)
        hits = self.load().rank(query, texts, top_k, min_score=least, **of_first_stage, **options)
        return [_text_hit(hit) for hit in hits]

    def _first_stage_of(
        self,
        texts: Sequence[Any],
        metadata: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None] | None,
        overrides: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return `MatryoshkaReranker.rank`'s arguments with the first stage's scores; empty without fusion."""
        of_call = {name: overrides[name] for name in FIRST_STAGE_ARGUMENTS if name in overrides}
        first_stage = of_call.get("first_stage", None if of_call else self.first_stage)
        _check_first_stage(first_stage, overrides.get("fusion"), first_stage_scores=of_call.get("first_stage_scores"))
        if first_stage == NONE:
            return {}
        if first_stage is not None:
            return {"first_stage": first_stage}
        if of_call:
            return of_call
        key, weight = self.first_stage_key, overrides.get("fusion", self.given.get("fusion"))
        is_asked = key is not None or weight is not None
        if not is_asked and self.load().fusion is None:
            return {}
        values = scores if key is None else [found.get(key) for found in metadata]
        if values is not None and (not texts or any(value is not None for value in values)):
            return {"first_stage_scores": self._checked(values)}
        if not is_asked:
            return {}
        asked = f"fusion={weight!r}" if key is None else f"first_stage_key={key!r}"
        lack = "the library's texts have no score field" if values is None else f"none of {len(texts)} texts has one"
        raise ValueError(
            f"{asked} needs the first stage's scores, but {lack}. Give first_stage_key, the name of the metadata that "
            "holds them, or first_stage='order' for texts in the first stage's order."
        )

    def _checked(self, values: Sequence[Any]) -> Sequence[Any]:
        """Check the first stage's scores; an error says where they come from."""
        try:
            as_first_stage(0, values, len(values))
        except (TypeError, ValueError) as error:
            of_field = f"the texts' scores, which first_stage={NONE!r} ignores"
            source = of_field if self.first_stage_key is None else f"the texts' metadata {self.first_stage_key!r}"
            raise type(error)(f"{error} They are {source}.") from None
        return values

    @property
    def is_from_path(self) -> bool:
        """Whether the adapter was made from a path, so that it can be saved."""
        return self._path is not None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor as JSON values, except the keys of a cascade, which are ints.

        Raises:
            ValueError: if the adapter was made from a re-ranker, whose options of loading are not known.
        """
        if self._path is None:
            raise ValueError("a loaded MatryoshkaReranker cannot be saved or pickled: give its path instead.")
        own = {
            "meta_fields_to_embed": self.meta_fields_to_embed or None,
            "embedding_separator": None if self.embedding_separator == "\n" else self.embedding_separator,
            "score_threshold": self.min_score,
            "first_stage_key": self.first_stage_key,
            "first_stage": self.first_stage,
        }
        return {
            "reranker": self._path,
            **self.given,
            **{name: value for name, value in own.items() if value is not None},
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _ranking, (self.arguments(),)

    def __deepcopy__(self, memo: object) -> RankingAdapter:
        # An adapter does not change, and copies of the weights would fill the memory.
        return self

    @staticmethod
    def _described(
        contents: Sequence[str | None], metadata: Sequence[Mapping[str, Any]] | None
    ) -> list[tuple[str | None, Mapping[str, Any]]]:
        described = [{}] * len(contents) if metadata is None else metadata
        if len(contents) != len(described):
            raise ValueError(f"{len(contents)} texts need a list of {len(contents)} metadata, got {len(described)}.")
        return list(zip(contents, described, strict=True))

    def _text(self, content: str | None, metadata: Mapping[str, Any]) -> str:
        values = [str(metadata[name]) for name in self.meta_fields_to_embed if metadata.get(name) is not None]
        # The re-ranker refuses a text that is not a string and names its index.
        return self.embedding_separator.join([*values, content or ""]) if values or content is None else content


def _ranking(arguments: dict[str, Any]) -> RankingAdapter:
    return RankingAdapter(**arguments)


def _text_hit(hit: Mapping[str, Any]) -> TextHit:
    index, score, cutoff_layer = int(hit["corpus_id"]), float(hit["score"]), hit.get("cutoff_layer")
    if "fused_score" not in hit:
        return TextHit(index, score, {}, cutoff_layer)
    metadata = {RERANKER_SCORE: score, FIRST_STAGE_SCORE: float(hit["first_stage_score"])}
    return TextHit(index, float(hit["fused_score"]), metadata, cutoff_layer)


def _check_first_stage(first_stage: Any, fusion: Any, **scores: Any) -> None:
    """Raise ValueError if `first_stage` has an unknown value, or contradicts the weight or another source of scores.

    Args:
        scores: other arguments that give the first stage's scores, by name; None is an argument that is not given.
    """
    if first_stage not in (None, ORDER, NONE):
        raise ValueError(f"first_stage is {excerpt(first_stage)}, but must be {ORDER!r}, {NONE!r} or None.")
    given = {name: value for name, value in scores.items() if value is not None}
    if first_stage == NONE and fusion is not None:
        given["fusion"] = fusion
    for name, value in given.items():
        if first_stage is not None:
            raise ValueError(f"{name}={excerpt(value)} and first_stage={first_stage!r}: give one of them.")


def _least(score_threshold: float | None, min_score: float | None) -> float | None:
    """Return the lowest score, under either of its names.

    Raises:
        ValueError: if both names are given, or the value is not a number.
    """
    if score_threshold is not None and min_score is not None:
        raise ValueError(f"score_threshold={score_threshold!r} and min_score={min_score!r}: give one of them.")
    name, value = ("score_threshold", score_threshold) if min_score is None else ("min_score", min_score)
    if value is not None and (not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value)):
        raise ValueError(f"{name} is {value!r}, but must be a number.")
    return value


def _plain(name: str, value: Any) -> Any:
    """Return an option in a form that JSON or a pickle can hold."""
    if name == "cascade":
        stages = value.items() if isinstance(value, Mapping) else value
        # The keys of an object in JSON are strings.
        return dict(as_stages([(int(layer) if isinstance(layer, str) else layer, share) for layer, share in stages]))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, torch.device | PathLike) else value
