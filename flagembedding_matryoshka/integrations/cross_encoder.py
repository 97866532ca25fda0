"""sentence-transformers' CrossEncoder with a Matryoshka re-ranker in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.util import import_from_string
from torch import nn
from transformers.utils import cached_file

from flagembedding_matryoshka.checkpoints.gguf import resolve
from flagembedding_matryoshka.checkpoints.loading import hub_options
from flagembedding_matryoshka.checkpoints.shipped import locate
from flagembedding_matryoshka.inference.fusion import AUTO, as_weight, best_first, fuse, read_first_stage
from flagembedding_matryoshka.inference.inputs import as_count, as_lists, excerpt
from flagembedding_matryoshka.integrations.sentence_transformers import KWARGS, MatryoshkaModule

HUB = ("token", "cache_folder", "revision", "local_files_only", "trust_remote_code")
FIRST_NAMES = {
    "automodel_args": "model_kwargs",
    "tokenizer_args": "processor_kwargs",
    "tokenizer_kwargs": "processor_kwargs",
    "config_args": "config_kwargs",
    "cache_dir": "cache_folder",
}
"""Arguments of CrossEncoder that have been renamed, and are read under both names."""
FUSION_ARGUMENTS = ("first_stage_scores", "first_stage", "fusion")


class MatryoshkaCrossEncoder(CrossEncoder):
    """A CrossEncoder whose `rank` takes depth and width, as its `predict`, and a first stage's scores."""

    def predict(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Score any iterable of pairs, as `CrossEncoder.predict`.

        Raises:
            TypeError: as `CrossEncoder.predict`, and if an argument of fusion is given, which only `rank` takes.
        """
        for name in FUSION_ARGUMENTS:
            if kwargs.pop(name, None) is not None:
                raise TypeError(
                    f"{name} is an argument of rank, which fuses the scores of one query's documents with those of the "
                    "first stage: leave it out here."
                )
        return super().predict(list(inputs) if isinstance(inputs, Iterator) else inputs, *args, **kwargs)

    def rank(  # type: ignore[override]
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable | None = None,
        device: str | list[str | torch.device] | None = None,
        pool: dict[str, Any] | None = None,
        chunk_size: int | None = None,
        first_stage_scores: Iterable[float | None] | None = None,
        first_stage: Literal["order"] | None = None,
        fusion: float | None = None,
        **depth_and_width: Any,
    ) -> list[dict[str, int | float | str]]:
        """As `CrossEncoder.rank`, by the scores before the activation, which may make some equal.

        Args:
            first_stage_scores, first_stage, fusion: as in `MatryoshkaReranker.rank`; None, the default, is no fusion.
                Documents then rank by z(score before the activation) + fusion · z(first-stage score). `fusion` must be
                a number: a CrossEncoder has no plan for "auto".
            depth_and_width: `cutoff_layers`, `compress_layers` and `compress_ratio`.

        Returns:
            As `CrossEncoder.rank`; with first-stage scores also "first_stage_score" and "fused_score" of each document.

        Raises:
            TypeError: if `documents` is not a list of strings, an argument is unknown, or a first-stage score or
                `fusion` is not a number.
            ValueError: if `top_k` is less than 1, the number of first-stage scores is not the number of documents, a
                first-stage score is not finite, both `first_stage_scores` and `first_stage` are given, one of them is
                given without `fusion`, or `fusion` is given without them, is negative, not finite or "auto".
        """
        if top_k is not None:
            top_k = as_count("top_k", top_k, ", or None for all documents")
        (query,), (documents,) = as_lists([query], [documents])
        of_query = None if first_stage_scores is None else [first_stage_scores]
        ((_, _, first),) = read_first_stage([(query, documents)], of_query, first_stage)
        weight = _weight(fusion, has_first_stage=first is not None)
        if not documents:
            return []
        raw = self.predict(
            [(query, document) for document in documents],
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=nn.Identity(),
            convert_to_tensor=True,
            device=device,
            pool=pool,
            chunk_size=chunk_size,
            **depth_and_width,
        )
        raw = raw.float().cpu()
        scores = (activation_fn or self.activation_fn or nn.Identity())(raw).tolist()
        hits: list[dict[str, int | float | str]] = [
            {"corpus_id": index, "score": score} for index, score in enumerate(scores)
        ]
        order = raw.argsort(descending=True, stable=True)
        if first is not None and weight is not None:
            fused = fuse(raw, torch.tensor(first, dtype=torch.float64), weight)
            order = best_first(fused, raw)
            for hit, of_first_stage, of_both in zip(hits, first, fused.tolist(), strict=True):
                hit |= {"first_stage_score": of_first_stage, "fused_score": of_both}
        return [
            hits[index] | ({"text": documents[index]} if return_documents else {}) for index in order[:top_k].tolist()
        ]


def _weight(fusion: Any, has_first_stage: bool) -> float | None:
    """Check `fusion` and return the weight of the first stage's scores; None without such scores.

    Raises:
        TypeError: if `fusion` is not a number.
        ValueError: if there are scores without a weight or a weight without scores, or the weight is "auto", negative
            or not finite.
    """
    if fusion is None and not has_first_stage:
        return None
    if fusion is None:
        raise ValueError("first_stage_scores and first_stage need a weight: give fusion=, a number of at least 0.")
    if not has_first_stage:
        raise ValueError(
            f"fusion={excerpt(fusion)} needs the first stage's scores: give first_stage_scores, or first_stage='order' "
            "for documents in its order."
        )
    if isinstance(fusion, str) and fusion == AUTO:
        raise ValueError(
            f"fusion={AUTO!r}: a CrossEncoder has no plan. Give a number, such as MatryoshkaReranker's plan.fusion."
        )
    return as_weight(fusion)


def load_cross_encoder(
    path: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    num_labels: int | None = None,
    backend: str = "torch",
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    activation_fn: Callable | None = None,
    **kwargs: Any,
) -> MatryoshkaCrossEncoder:
    """A CrossEncoder of "smollm2" or any checkpoint.

    Its `predict` gives the raw scores of `compute_score`, unless the checkpoint was saved by sentence-transformers with
    an activation function.

    What `export` and fine-tuning write, `CrossEncoder(path, trust_remote_code=True)` loads too: sentence-transformers
    imports modules of other packages only then. This needs none.

    Args:
        max_length: as of `MatryoshkaReranker`; None is the length that the checkpoint was saved with, or 512.
        num_labels: 1 or None.
        backend: "torch".
        prompts, default_prompt_name: instructions by name, beside those saved with the checkpoint.
        activation_fn: of the scores; None is the one that the checkpoint was saved with, or none.
        kwargs: others of CrossEncoder, as `device`, `model_kwargs={"dtype": …}`, `revision` and `token`.

    Raises:
        TypeError: on arguments that CrossEncoder has not, that would do nothing here, or that are given twice.
        ValueError: as `MatryoshkaModule.load`.
    """
    kwargs = _renamed(kwargs)
    if refused := sorted({"modules", "classifier_dropout", "keep_in_fp32_modules"} & kwargs.keys()):
        raise TypeError(f"{refused}: a checkpoint of ours has its own modules, and no dropout or format in its heads.")
    of_loading = {name: kwargs.pop(name) for name in (*HUB, *KWARGS) if kwargs.get(name) is not None}
    of_loading.setdefault("cache_folder", os.getenv("SENTENCE_TRANSFORMERS_HOME"))
    for name, value, place, inner in (
        ("max_length", max_length, "processor_kwargs", "model_max_length"),
        ("num_labels", num_labels, "config_kwargs", "num_labels"),
    ):
        if value is not None:
            if inner in (others := of_loading.get(place, {})):
                raise TypeError(f"{name}={value} and {place}'s {inner}={others[inner]!r} are one; give one.")
            of_loading[place] = {**others, inner: value}
    module = MatryoshkaModule.load(str(path), backend=backend, **of_loading)
    saved = _saved_config(str(path), of_loading)
    return MatryoshkaCrossEncoder(
        modules=[module],
        activation_fn=activation_fn or _activation(module.activation),
        prompts={**saved.get("prompts", {}), **(prompts or {})},
        default_prompt_name=default_prompt_name or saved.get("default_prompt_name"),
        local_files_only=of_loading.get("local_files_only", False),
        trust_remote_code=of_loading.get("trust_remote_code", False),
        **kwargs,
    )


def _activation(name: str) -> Callable:
    """The activation function that a checkpoint names: of torch, for no other code runs."""
    known = {"identity": nn.Identity, "sigmoid": nn.Sigmoid}
    return known[name]() if name in known else import_from_string(name)()


def _renamed(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments under the names of today, without those of old that are None.

    Raises:
        TypeError: if one is given under two names.
    """
    found = {name: value for name, value in given.items() if name not in FIRST_NAMES}
    names = {name: name for name, value in found.items() if value is not None}
    for first, name in FIRST_NAMES.items():
        if given.get(first) is None:
            continue
        if name in names:
            raise TypeError(f"{first} and {names[name]} are one argument with two names; give one.")
        found[name], names[name] = given[first], first
    return found


def _saved_config(path: str, of_loading: dict[str, Any]) -> dict[str, Any]:
    """What sentence-transformers saved of a CrossEncoder beside its module, if it did."""
    given = {name: of_loading.get(name) for name in ("token", "revision", "local_files_only")}
    hub = hub_options(of_loading["cache_folder"], **given)  # type: ignore[arg-type]
    place = resolve(locate(path), of_loading["cache_folder"])
    name = "config_sentence_transformers.json"
    file = cached_file(place, name, _raise_exceptions_for_missing_entries=False, **hub)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
