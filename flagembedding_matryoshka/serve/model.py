"""The re-ranker as the server uses it: one call scores documents of several requests."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flagembedding_matryoshka.inference.calibration import Normalizer
from flagembedding_matryoshka.inference.chunking import Candidates, CutDocument
from flagembedding_matryoshka.inference.fingerprint import model_fingerprint
from flagembedding_matryoshka.inference.fusion import AUTO, Fusion
from flagembedding_matryoshka.inference.inputs import Passage, excerpt
from flagembedding_matryoshka.inference.options import CALIBRATED, ScoringOptions, ranking_weight
from flagembedding_matryoshka.inference.plan import Plan
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.inference.scoring import Hit, best_chunks, fuse_hits
from flagembedding_matryoshka.inference.store import PassageStore, StoredPair
from flagembedding_matryoshka.serve.forms.common import Scale, sigmoid
from flagembedding_matryoshka.serve.truncation import Lengths, Truncator
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import TokenizedPair, count_input_tokens

logger = logging.getLogger(__name__)

NO_TIME = 1e-9
"""Seconds for a deadline that has passed: scoring stops at the first exit."""

QUALITIES = {"fast": (0.95, 1 / 3), "balanced": (0.99, 2 / 3)}
"""Of each preset the share of the full network's nDCG@10, and without a plan the share of the layers."""


def is_shallower(exit: int, setting: Setting) -> bool:
    """Return whether an exit is shallower than a setting's depth and not deeper than a stage of its cascade."""
    return exit < setting.depth and all(exit <= layer for layer, _ in setting.cascade)


def check_degrade_to(exit: int | None, reranker: MatryoshkaReranker) -> None:
    """Raise ValueError unless an exit exists and `is_shallower` than the setting of requests that name no depth."""
    if exit is None:
        return
    setting = reranker.setting()
    possible = [layer for layer in reranker.config.exit_layers if is_shallower(layer, setting)]
    if exit not in possible:
        raise ValueError(f"degrade_to is {exit}, but must be an exit shallower than {setting}: one of {possible}.")


def check_cache(cache_bytes: int | None, batch_invariant: bool) -> None:
    """Raise ValueError if scores are to be kept, but depend on the other pairs of their batch."""
    if cache_bytes is not None and not batch_invariant:
        raise ValueError(
            f"cache_bytes is {cache_bytes}, but scores depend on their batch: give batch_invariant, too, or leave "
            "cache_bytes out."
        )


class TaskKey(NamedTuple):
    """What tasks of a batch have in common.

    Attributes:
        setting: depth, width, cascade and store layer.
        is_stored: whether passages are read from the store.
        end: the deadline, as a value of `time.monotonic`; None is no deadline.
        fusion: weight of the first stage's scores, if candidates are dropped by fused scores; otherwise None.
    """

    setting: Setting
    is_stored: bool = False
    end: float | None = None
    fusion: float | None = None


@dataclass(frozen=True)
class Task:
    """A query with its documents, tokenised, and the setting to score them at.

    Attributes:
        setting: depth, width and cascade.
        pairs: pairs of the query and each document, or each chunk of a document.
        shared_tokens, tokens: see `MatryoshkaReranker.count_tokens`.
        cut: chunks of each document; None if the request does not ask for chunks.
        end: the deadline, as a value of `time.monotonic`; None is no deadline.
        shows_exit: whether hits name their exit even if all scores are read at one exit.
        fusion: first-stage scores of the documents, and their weight; None is no fusion.
    """

    setting: Setting
    pairs: Sequence[TokenizedPair]
    shared_tokens: int
    tokens: Sequence[int]
    cut: Sequence[CutDocument] | None = None
    end: float | None = None
    shows_exit: bool = False
    fusion: Fusion | None = None

    @property
    def key(self) -> TaskKey:
        """The key for `Scorer.compute`. Tasks with equal keys can share a batch."""
        weight = None if self.fusion is None or self.divisible else self.fusion.weight
        return TaskKey(self.setting, self.is_stored, self.end, weight)

    @property
    def is_stored(self) -> bool:
        """Whether the passages are read from the store."""
        return any(isinstance(pair, StoredPair) for pair in self.pairs)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of stored passages."""
        return sum(pair.states.nbytes for pair in self.pairs if isinstance(pair, StoredPair))

    @property
    def items(self) -> Sequence[Any]:
        """Items for `Scorer.compute`: pairs, or (pair, first-stage score) if candidates are dropped by fused scores."""
        if self.fusion is None or self.divisible:
            return self.pairs
        of_pairs = Candidates((), self.pairs, self.cut, self.fusion.first_stage).first_stage_of_pairs
        return list(zip(self.pairs, of_pairs or (), strict=True))

    @property
    def divisible(self) -> bool:
        """Whether documents can be scored in several batches: no cascade or deadline compares them."""
        return self.end is None and not self.setting.cascade

    def plain_hits(self, scores: Sequence[float]) -> list[Hit]:
        """Return the hits that `Scorer.compute` makes of scores of `pairs`, if the task is divisible."""
        hits: list[Hit] = [{"score": score} for score in scores]
        for hit, pair in zip(hits, self.pairs, strict=True):
            if pair.is_cut:
                hit["is_truncated"] = True
        return hits

    def hits(self, found: Sequence[Hit]) -> Sequence[Hit]:
        """Return the hit of each document from the hits of `pairs`."""
        if self.shows_exit:
            found = [{"cutoff_layer": self.setting.depth} | hit for hit in found]
        if self.cut is not None:
            found = best_chunks(found, self.cut)
        return found if self.fusion is None else fuse_hits(found, self.fusion.first_stage, self.fusion.weight)

    def of_pairs(self, numbers: Sequence[int]) -> Task:
        """Return the task of some of the pairs."""
        pairs = [self.pairs[number] for number in numbers]
        shared_tokens, tokens = count_input_tokens(pairs)
        return replace(self, pairs=pairs, shared_tokens=shared_tokens, tokens=tokens)

    @property
    def all_tokens(self) -> int:
        """Number of tokens that the model reads for the task."""
        return self.shared_tokens + sum(self.tokens)


class Scorer:
    """A re-ranker that makes tasks of requests and computes them.

    Args:
        reranker: the re-ranker.
        store: directory of stored passages, which requests may name by their ids; None is none.

    Raises:
        FileNotFoundError, ValueError: as `MatryoshkaReranker.open_store`.

    Attributes:
        fingerprint: the model's, see `model_fingerprint`.
        store: the open store; None is none.
        deadlines: number of tasks with a deadline that wait or are computed.
    """

    def __init__(self, reranker: MatryoshkaReranker, store: Path | None = None) -> None:
        self.reranker = reranker
        self.store: PassageStore | None = None if store is None else reranker.open_store(store)
        self.fingerprint = model_fingerprint(reranker)
        self.deadlines = 0
        self._requests = 0
        self._unused = asyncio.Event()
        self._truncator = Truncator(reranker)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep `end` waiting while the context is open."""
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._unused.set()

    async def end(self) -> None:
        """Wait until no request uses the re-ranker, and end its worker processes."""
        while self._requests:
            self._unused.clear()
            await self._unused.wait()
        await asyncio.to_thread(self.reranker.close)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a batch: one pass on each device."""
        return self.reranker.max_tokens_per_batch * len(self.reranker.target_devices)

    @property
    def summary(self) -> str:
        """What is served, for a log: devices, dtype, exits and template."""
        description = self.reranker.description
        dtype = str(self.reranker.model.dtype).removeprefix("torch.")
        return (
            f"on {', '.join(self.reranker.target_devices)} in {dtype}, exits {self.reranker.config.exit_layers}, "
            f"template {description.template_name.value or 'of its own'} [{description.template.source}]"
        )

    @cached_property
    def plan(self) -> Plan | None:
        """The plan beside the model; None if there is no valid plan.

        The plan is read once. Its errors go to the log and not to clients, because they name paths.
        """
        try:
            return self.reranker.plan
        except FileNotFoundError as error:
            logger.info("the model has no plan: %s", error)
        except ValueError as error:
            logger.warning("the plan beside the model cannot be used: %s", error)
        return None

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        """Settings to begin with, by name, as fields of a request: "fast", "balanced" and "full".

        They are the cheapest settings of the plan that keep `QUALITIES` of the full network's nDCG@10. Without a plan
        they are exits at a third and two thirds of the layers, at full width.
        """
        found = {name: self._preset(quality, share) for name, (quality, share) in QUALITIES.items()}
        found["full"] = Setting((self.reranker.config.exit_layers[-1],))
        fields = {name: setting.arguments | {"cascade": dict(setting.cascade)} for name, setting in found.items()}
        for one in fields.values():
            if not one["store_layer"]:
                del one["store_layer"]  # a request has no such field: it is an option of the server
        return fields

    def _preset(self, quality: float, share: float) -> Setting:
        """Return the plan's cheapest setting of a quality; without one the first exit from a share of the layers on."""
        with suppress(ValueError):
            if self.plan is not None:
                return self.plan.choose(quality=quality)
        exits = self.reranker.config.exit_layers
        return Setting((next(layer for layer in exits if layer >= share * exits[-1]),))

    @property
    def fusion_weights(self) -> dict[str, float | None]:
        """Weights of the first stage's scores: "default" of requests without `fusion`, "plan" of "auto"; or None."""
        options = ScoringOptions.resolve(self.reranker, {})
        return {"default": options.fusion, "plan": None if self.plan is None else self.plan.fusion}

    def fusion(self, weight: float | str | None, first_stage: Sequence[float] | None) -> Fusion | None:
        """Return first-stage scores with their weight; None without first-stage scores.

        Args:
            weight: as `fusion` of `MatryoshkaReranker.rank`.
            first_stage: the first stage's score of each document; None without such scores.

        Raises:
            TypeError, ValueError: as `MatryoshkaReranker.rank`, and ValueError if the weight is "auto" and the model
                has no plan.
        """
        if weight == AUTO and self.plan is None:
            raise ValueError(f"fusion={AUTO!r}: the model has no plan with a weight. Give a number.")
        asked = {"fusion": weight}
        options = ScoringOptions.resolve(self.reranker, asked)
        found = ranking_weight(options, asked, first_stage is not None)
        return None if first_stage is None or found is None else Fusion(found, first_stage)

    def scale(
        self,
        setting: Mapping[str, Any],
        shown: Mapping[str, Any],
        deadline_ms: float | None = None,
        instruction: str | None = None,
    ) -> Scale:
        """Return the function that turns raw scores into the scores that an answer shows. The model does not run.

        Args:
            setting: arguments of `MatryoshkaReranker.setting`.
            shown: arguments of `MatryoshkaReranker.normalizer`.
            deadline_ms: deadline of the request; None is no deadline.
            instruction: instruction of the query; None is the model's own, "" is none.

        Raises:
            TypeError, ValueError: as `MatryoshkaReranker.normalizer`, and ValueError if the model has no plan, or the
                instruction has more tokens than `max_length`.
        """
        if shown["normalize"] == CALIBRATED and self.plan is None:
            raise ValueError(f"normalize={CALIBRATED!r}: the model has no plan with a calibration. Give true or false.")
        normalizer = self.reranker.normalizer(**setting, **shown, deadline_ms=deadline_ms, instruction=instruction)
        self._truncator.refuse_too_long(instruction)
        return _scale(shown["normalize"], normalizer, self.reranker.temperature)

    def with_store(self, setting: Mapping[str, Any], documents: Sequence[str | Passage]) -> Mapping[str, Any]:
        """Return arguments of `MatryoshkaReranker.setting`, if documents are stored with the store's layer and ratio.

        Raises:
            ValueError: if only some documents are stored, there is no store or it lacks one, or the arguments have
                another ratio or layers than the store.
        """
        stored = [number for number, document in enumerate(documents) if isinstance(document, Passage)]
        if not stored:
            return setting
        if self.store is None:
            raise ValueError(f"documents.{stored[0]} has an id and no text, but the server has no store of passages.")
        if len(stored) < len(documents):
            other = min(set(range(len(documents))) - {*stored})
            raise ValueError(
                f"documents.{other} has a text, but documents.{stored[0]} an id alone: give the documents of a query "
                "all as texts or all by their ids."
            )
        for number, document in enumerate(documents):
            if isinstance(document, Passage) and document.id not in self.store:
                raise ValueError(f"documents.{number}: the store has no passage with the id {excerpt(document.id)}.")
        own = self.store.conditions
        layers = [own.store_layer] if own.compress_ratio > 1 else []
        fixed = {"store_layer": own.store_layer, "compress_ratio": own.compress_ratio, "compress_layers": layers}
        for name in ("compress_ratio", "compress_layers"):
            value = setting.get(name)
            asked = [value] if isinstance(value, int) and name == "compress_layers" else value
            if asked is not None and asked != fixed[name]:
                raise ValueError(f"{name} is {value}, but stored passages have {fixed[name]}: leave it out.")
        return {**setting, **fixed}

    @property
    def stored(self) -> dict[str, dict[str, int | str | None]]:
        """Number, layer, ratio and format of the stored passages, as "store"; nothing without a store."""
        if self.store is None:
            return {}
        own = self.store.conditions
        names = ("store_layer", "compress_ratio", "state_quantization")
        return {"store": {"passages": len(self.store)} | {name: getattr(own, name) for name in names}}

    def prepare(
        self,
        query: str,
        documents: Sequence[str | Passage],
        setting: Mapping[str, Any],
        lengths: Lengths,
        max_pairs: int,
        others: int,
        chunks: Mapping[str, Any] | None = None,
        instruction: str | None = None,
        fusion: Fusion | None = None,
    ) -> Task:
        """Tokenise a query and its documents, or read the states of stored ones. The model does not run.

        Args:
            documents: texts, or the ids of stored passages.
            setting: arguments of `MatryoshkaReranker.setting`, as `with_store` returns them.
            lengths: most tokens of the texts.
            max_pairs: most documents, or chunks, of a request.
            others: documents, or chunks, of other queries of the request.
            chunks: arguments of `MatryoshkaReranker.cut_chunks`; None is no chunks.
            instruction: instruction of the query; None is the model's own, "" is none.
            fusion: first-stage scores of the documents, and their weight; None is no fusion.

        Raises:
            TypeError, ValueError: if the setting does not fit the model, the query leaves no room for a document, there
                are too many chunks, or as `Truncator.truncate`; ValueError if options of texts are given with stored
                passages.
        """
        chosen = self.reranker.setting(**setting)
        ids = [document.id or "" for document in documents if isinstance(document, Passage)]
        if ids and self.store is not None:
            if chunks is not None or lengths.keep_end or (lengths.document, lengths.pair) != (None, None):
                raise ValueError(
                    "stored passages were truncated when they were stored: leave out max_chunks_per_doc, overlap, "
                    "max_tokens_per_doc, truncate_prompt_tokens and a truncation_direction of Left"
                )
            short = self._truncator.truncate(query, [], lengths, instruction)
            given = chosen.arguments | {"instruction": instruction}
            stored = self.reranker.stored_pairs(short.query, ids, self.store, **given)
            if lengths.refuse and any(pair.is_cut for pair in stored):
                raise ValueError("truncate=false, but the query or a stored passage is truncated")
            return Task(chosen, stored, *count_input_tokens(stored), fusion=fusion)
        texts = [document for document in documents if isinstance(document, str)]
        short = self._truncator.truncate(query, texts, lengths, instruction)
        if chunks is None:
            pairs = self.reranker.tokenize([(short.query, text) for text in short.documents], instruction=instruction)
            pairs = [
                replace(pair, passage_is_cut=pair.passage_is_cut or is_cut)
                for pair, is_cut in zip(pairs, short.is_cut, strict=True)
            ]
            return Task(chosen, pairs, *count_input_tokens(pairs), fusion=fusion)
        # Of a document with too many chunks one chunk more than allowed is made, and no others.
        most = min(max_pairs - others + 1, chunks["max_chunks_per_doc"] or math.inf)
        own = {**chunks, "max_chunks_per_doc": most}
        whole = self.reranker.cut_chunks(short.query, short.documents, **own, instruction=instruction)
        if (count := others + sum(len(document.chunks) for document in whole)) > max_pairs:
            raise ValueError(f"{count} chunks are more than {max_pairs}")
        cut = [
            document._replace(is_truncated=document.is_truncated or is_cut)
            for document, is_cut in zip(whole, short.is_cut, strict=True)
        ]
        pairs = [chunk.pair for document in cut for chunk in document.chunks]
        return Task(chosen, pairs, *count_input_tokens(pairs), cut, fusion=fusion)

    def count_operations(self, task: Task, hits: Sequence[Mapping[str, Any]]) -> int:
        """Count floating-point operations, as if the task were alone in its batch, by `estimate_flops`.

        Args:
            hits: results of `compute` for the task.
        """
        setting = task.setting
        if task.divisible:
            return self.reranker.estimate_flops(task.pairs, **setting.arguments)
        depths = [hit["cutoff_layer"] for hit in hits]
        exits = sorted({*dict(setting.cascade), *depths, setting.depth})
        return self.reranker.estimate_flops(task.pairs, depths, **setting.arguments | {"cutoff_layers": exits})

    def _milliseconds_until(self, end: float) -> float:
        seconds = (end - time.monotonic()) / max(1, self.deadlines)
        return max(seconds, NO_TIME) * 1000

    def compute(self, key: TaskKey, items: list[Sequence[Any]], between: Callable[[], None]) -> list[list[Hit]]:
        """Score the documents of each task.

        Args:
            key: key of the tasks. A task with a deadline gets the time until then, divided by the number of tasks with
                a deadline.
            items: the `Task.items` of each task.
            between: called between the batches of a cascade, or between the steps until a deadline. Its exception ends
                the call.

        Returns:
            For each task a list with a dict for each item: "score", not normalised, with a cascade or a deadline
            "cutoff_layer", "is_truncated" if the pair was cut, and if candidates are dropped by fused scores
            "first_stage_score" and "fused_score".

        Raises:
            ArithmeticError: if a score is not a finite number.
            torch.OutOfMemoryError: if a single pair does not fit into memory.
        """
        setting = key.setting
        fused: dict[str, Any] = {}
        if key.fusion is not None:
            fused = {"fusion": key.fusion, "first_stage_scores": [[first for _, first in task] for task in items]}
            items = [[pair for pair, _ in task] for task in items]
        return self.reranker.score_lists(
            items,
            cascade=dict(setting.cascade) or None,
            show_progress_bar=False,
            deadline_ms=None if key.end is None else self._milliseconds_until(key.end),
            between_batches=between,
            **setting.arguments,
            **fused,
        )


def _scale(normalize: bool | str, normalizer: Normalizer | None, temperature: float) -> Scale:
    """Return the function that turns raw scores into the scores that an answer shows.

    Args:
        normalize: as in `MatryoshkaReranker`.
        normalizer: result of `MatryoshkaReranker.normalizer`; None for raw scores.
        temperature: scores are divided by it before the sigmoid.
    """
    if normalizer is None:
        return lambda score, layer: score
    if normalize is True:
        return lambda score, layer: sigmoid(score / temperature)
    return lambda score, layer: normalizer(torch.tensor(score), layer).item()
