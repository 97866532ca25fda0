"""What the adapters have in common: how they load, rank, cut and are pickled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import signature
from numbers import Real
from os import PathLike
from typing import Any

import torch

from flagembedding_matryoshka.inference.options import DEPTH_AND_WIDTH, ScoringOptions
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.setting import as_stages

OF_LOADING = {"device", *signature(MatryoshkaReranker).parameters} - {"model_name_or_path"}
OF_RANKING = {
    *("cascade", "compress_layer", "deadline_ms", "min_score", "show_progress_bar"),
    *DEPTH_AND_WIDTH,
    *(field.name for field in fields(ScoringOptions)),
}


class Ranking:
    """A re-ranker, and how it ranks. It can be pickled where it was made from a path, which is then loaded again.

    Args:
        reranker: or the path of one, which `load` loads.
        meta_fields_to_embed: metadata that stands before a text, where there is some of that name.
        embedding_separator: what stands between them.
        score_threshold: another name of `min_score`: texts with a lower score are left out; of the scores that are
            returned, which mean the same at the several exits of a cascade or a deadline only with
            `normalize="calibrated"`.
        options: what `MatryoshkaReranker.rank` takes: `cutoff_layers`, `compress_layers`, `compress_ratio`, `cascade`,
            `normalize`, `instruction`, `min_score`, …; with a path also what its constructor takes: `devices` (or
            `device`), `dtype`, `budget`, `token`, `revision`, … None keeps a default.

    Attributes:
        options: those that are given to each call.

    Raises:
        TypeError: if an option is unknown, or one of loading is given with a re-ranker that is loaded.
        ValueError: if `min_score` is not a number, or it or a device is given twice.
    """

    def __init__(
        self,
        reranker: MatryoshkaReranker | str | PathLike[str],
        meta_fields_to_embed: Sequence[str] | None = None,
        embedding_separator: str = "\n",
        score_threshold: float | None = None,
        **options: Any,
    ) -> None:
        given = {name: _plain(name, value) for name, value in options.items() if value is not None}
        if unknown := sorted(given.keys() - OF_LOADING - OF_RANKING):
            raise TypeError(f"unknown arguments {unknown}; there are {sorted(OF_LOADING | OF_RANKING)}.")
        is_path = isinstance(reranker, str | PathLike)
        if not is_path and (of_loading := sorted(given.keys() - OF_RANKING)):
            raise TypeError(
                f"{of_loading} are said when a re-ranker is loaded, and this one is: give its path instead."
            )
        if isinstance(meta_fields_to_embed, str):
            raise TypeError(f"meta_fields_to_embed must be a list of names, got the string {meta_fields_to_embed!r}.")
        if "device" in given and "devices" in given:
            raise ValueError(f"device={given['device']!r} and devices={given['devices']!r}: give one of them.")
        self.min_score = _least(score_threshold, given.pop("min_score", None))
        self.meta_fields_to_embed = list(meta_fields_to_embed or ())
        self.embedding_separator = embedding_separator
        self.given = given
        self._path = str(reranker) if isinstance(reranker, str | PathLike) else None
        self._reranker = None if isinstance(reranker, str | PathLike) else reranker
        self.options = {name: value for name, value in given.items() if not is_path or name not in OF_LOADING}

    def load(self) -> MatryoshkaReranker:
        """The re-ranker, loaded by the first call.

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

    def check(self, top_k: int | None = None) -> None:
        """Load the re-ranker, and raise what `rank` raises with these options."""
        self._rank("", [], top_k, self.min_score, self.options)

    def __call__(
        self,
        query: str,
        contents: Sequence[str | None],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        top_k: int | None = None,
        score_threshold: float | None = None,
        **overrides: Any,
    ) -> list[tuple[int, float]]:
        """(index, score) of the best texts, the best first.

        Args:
            contents: None is a text that is empty but for its metadata.
            metadata: of each of them.
            overrides: of `MatryoshkaReranker.rank`; as with `score_threshold`, None keeps the ranking's own.

        Raises:
            TypeError, ValueError: as `MatryoshkaReranker.rank`.
        """
        own = _least(score_threshold, overrides.pop("min_score", None))
        texts = [self._text(content, found) for content, found in self._described(contents, metadata)]
        given = {name: value for name, value in overrides.items() if value is not None}
        hits = self._rank(query, texts, top_k, self.min_score if own is None else own, self.options | given)
        return [(int(hit["corpus_id"]), float(hit["score"])) for hit in hits]

    def _rank(
        self, query: str, texts: Sequence[Any], top_k: int | None, least: float | None, options: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        return self.load().rank(query, texts, top_k, min_score=least, **options)

    def arguments(self) -> dict[str, Any]:
        """The constructor's, as JSON can hold them but for the keys of a cascade.

        Raises:
            ValueError: if the ranking was made from a re-ranker, of which the path alone would not say enough.
        """
        if self._path is None:
            raise ValueError("what was made from a MatryoshkaReranker cannot be saved or pickled: make it from a path.")
        own = {
            "meta_fields_to_embed": self.meta_fields_to_embed or None,
            "embedding_separator": None if self.embedding_separator == "\n" else self.embedding_separator,
            "score_threshold": self.min_score,
        }
        return {
            "reranker": self._path,
            **self.given,
            **{name: value for name, value in own.items() if value is not None},
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _ranking, (self.arguments(),)

    def __deepcopy__(self, memo: object) -> Ranking:
        # Nothing changes it, and weights are not for copying.
        return self

    @staticmethod
    def _described(
        contents: Sequence[str | None], metadata: Sequence[Mapping[str, Any]] | None
    ) -> list[tuple[str | None, Mapping[str, Any]]]:
        described = [{}] * len(contents) if metadata is None else metadata
        if len(contents) != len(described):
            raise ValueError(f"{len(contents)} texts need metadata of as many, got {len(described)}.")
        return list(zip(contents, described, strict=True))

    def _text(self, content: str | None, metadata: Mapping[str, Any]) -> str:
        values = [str(metadata[name]) for name in self.meta_fields_to_embed if metadata.get(name) is not None]
        # A text that is no string is for the re-ranker to refuse, by its place.
        return self.embedding_separator.join([*values, content or ""]) if values or content is None else content


def _ranking(arguments: dict[str, Any]) -> Ranking:
    return Ranking(**arguments)


def _least(score_threshold: float | None, min_score: float | None) -> float | None:
    """The one of both that is given.

    Raises:
        ValueError: if both are, or it is not a number.
    """
    if score_threshold is not None and min_score is not None:
        raise ValueError(f"score_threshold={score_threshold!r} and min_score={min_score!r}: give one of them.")
    name, value = ("score_threshold", score_threshold) if min_score is None else ("min_score", min_score)
    if value is not None and (not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value)):
        raise ValueError(f"{name} is {value!r}, but must be a number.")
    return value


def _plain(name: str, value: Any) -> Any:
    """An option in a form that can be written down."""
    if name == "cascade":
        stages = value.items() if isinstance(value, Mapping) else value
        # JSON's keys are strings.
        return dict(as_stages([(int(layer) if isinstance(layer, str) else layer, share) for layer, share in stages]))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, torch.device | PathLike) else value
