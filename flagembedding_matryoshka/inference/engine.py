"""Tokenised pairs to scores, with one model on one device."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratios, use_token_adapter
from flagembedding_matryoshka.inference.batching import next_batch
from flagembedding_matryoshka.inference.cascade import run_cascade
from flagembedding_matryoshka.inference.deadline import AnytimeRun, Deadline
from flagembedding_matryoshka.inference.fusion import Fusion
from flagembedding_matryoshka.inference.memory import OutOfMemory, TokenLimit, computed
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.decoder import PackedStates
from flagembedding_matryoshka.models.flops import reading_share
from flagembedding_matryoshka.models.packing import pack_pairs
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import TokenizedPair

Parts = list[tuple[int, list[int]]]
"""Numbers of batches, and of each places in it, that are computed together."""
Stages = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Scores, exits and fused scores, as `run_cascade` returns them."""


class ExitScore(NamedTuple):
    """A candidate's score, the exit where it was read, and its fused score; without fusion this is the score."""

    score: float
    exit: int
    fused: float


class Task(Protocol):
    """A computation of an engine."""

    def start(self, engine: Engine) -> Callable[[], Any]:
        """Queue the work on the device, and return a callable that blocks until the result is ready and returns it."""
        ...


@dataclass(frozen=True)
class ScoreBatch:
    """The arguments of `Engine.start_scoring`."""

    pairs: Sequence[TokenizedPair]
    names: Sequence[int]
    setting: Setting

    def start(self, engine: Engine) -> Callable[[], list[list[float]]]:
        return engine.start_scoring(self.pairs, self.names, self.setting)


@dataclass(frozen=True)
class RunCascade:
    """The arguments of `Engine.cascade`."""

    batches: Sequence[Sequence[TokenizedPair]]
    names: Sequence[Sequence[int]]
    owners: Sequence[Sequence[int]]
    setting: Setting
    fusion: Fusion | None = None

    def start(self, engine: Engine) -> Callable[[], list[ExitScore]]:
        return partial(engine.cascade, self.batches, self.names, self.owners, self.setting, self.fusion)


@dataclass(frozen=True)
class RunUntil:
    """The arguments of `Engine.run_until`."""

    batches: Sequence[Sequence[TokenizedPair]]
    names: Sequence[Sequence[int]]
    setting: Setting
    deadline: Deadline
    fusion: Fusion | None = None

    def start(self, engine: Engine) -> Callable[[], list[ExitScore]]:
        return partial(engine.run_until, self.batches, self.names, self.setting, self.deadline, self.fusion)


class Engine:
    """Computes on the device that its model lies on; safe to call from several threads.

    Args:
        model: may hold token adapters; each call uses the one of its ratio.
        compile: fuse the layers' token-wise parts.

    Attributes:
        between_batches: called before each batch of a cascade's stages, or of the steps until a deadline. An exception
            ends them. None is no callback.
    """

    def __init__(self, model: CostWiseForCausalLM, compile: bool = False) -> None:
        self.model = model
        self.between_batches: Callable[[], None] | None = None
        if compile:
            model.model.compile_layers()
        self._has_token_adapters = bool(token_adapter_ratios(model))
        self._switching = threading.Lock()
        self._limit = TokenLimit()

    def run(self, tasks: Iterable[Task], device: str | None = None) -> Generator[tuple[int, Any], None, None]:
        """Yield the number and the result of each task, in their order. A GPU gets a task before the previous result
        is read.

        Args:
            device: the only device, or None. `WorkerPool.run` chooses a device by it.
        """
        ahead = 1 if self.model.device.type == "cuda" else 0
        started: deque[tuple[int, Callable[[], Any]]] = deque()
        for number, task in enumerate(tasks):
            started.append((number, task.start(self)))
            if len(started) > ahead:
                earlier, result = started.popleft()
                yield earlier, result()
        for number, result in started:
            yield number, result()

    def close(self) -> None:
        """Return at once: an engine has no processes to end. `WorkerPool.close` has."""

    def start_scoring(
        self, pairs: Sequence[TokenizedPair], names: Sequence[int], setting: Setting
    ) -> Callable[[], list[list[float]]]:
        """Score one batch. Out of memory, this and later batches are computed in smaller ones.

        Args:
            names: what an error calls the pairs.

        Returns:
            what waits for the scores: for each cutoff layer, in the order asked for, a score for each pair.

        Raises:
            ArithmeticError: when waiting, if a score is not a finite number.
            torch.OutOfMemoryError: if a single pair does not fit.
        """
        scores, start = [], 0
        while start < len(pairs):
            part = self._that_fits(pairs, start)
            batch = [pairs[place] for place in part]
            try:
                with self._adapted(setting.compress_ratio):
                    scores.append(computed(partial(self._forward, batch, setting)))
            except OutOfMemory as error:
                self._limit.halve(batch, names[start], error)
                continue
            self._limit.fitted()
            start += len(part)

        def wait() -> list[list[float]]:
            found = torch.cat(scores, dim=1).cpu()
            self._refuse_no_number(found, names)
            return found.tolist()

        return wait

    def cascade(
        self,
        batches: Sequence[Sequence[TokenizedPair]],
        names: Sequence[Sequence[int]],
        owners: Sequence[Sequence[int]],
        setting: Setting,
        fusion: Fusion | None = None,
    ) -> list[ExitScore]:
        """Score the pairs of a cascade.

        After an out-of-memory error all pairs start again, in smaller batches. Their order stays, also for `fusion`.

        Args:
            owners: for each batch the number of each pair's query.
            fusion: as in `run_cascade`.
            batches, names: as in `score`, whose errors are raised.

        Returns:
            score, exit and fused score of each pair, batch after batch.
        """

        def run(states: list[PackedStates], parts: Parts) -> Stages:
            of_packs = [[owners[number][place] for place in part] for number, part in parts]
            between_batches = self.between_batches

            def score(states: PackedStates, layer: int) -> torch.Tensor:
                if between_batches is not None:
                    between_batches()
                return self._read(states, layer, setting)

            return run_cascade(score, states, of_packs, setting, fusion)

        return self._in_stages(run, batches, names, setting)

    def run_until(
        self,
        batches: Sequence[Sequence[TokenizedPair]],
        names: Sequence[Sequence[int]],
        setting: Setting,
        deadline: Deadline,
        fusion: Fusion | None = None,
    ) -> list[ExitScore]:
        """Score and exit of each pair of one query, batch after batch, as deep as there is time until `deadline`, which
        starts now if it has not.

        What is computed again, out of memory, is within the same time. Names and errors are those of `score`.
        """
        deadline = deadline.start()

        def run(states: list[PackedStates], parts: Parts) -> Stages:
            exits, reading = self.model.config.exit_layers, reading_share(self.model.config)
            score = partial(self._read, setting=setting)
            return AnytimeRun(score, states, setting, exits, reading, deadline, self.between_batches, fusion).run()

        return self._in_stages(run, batches, names, setting)

    def _in_stages(
        self,
        run: Callable[[list[PackedStates], Parts], Stages],
        batches: Sequence[Sequence[TokenizedPair]],
        names: Sequence[Sequence[int]],
        setting: Setting,
    ) -> list[ExitScore]:
        """Embed the batches in parts, call `run` on their states, and return the score of each pair."""
        while True:
            parts = [(number, part) for number, pairs in enumerate(batches) for part in self._parts(pairs)]
            packs = [[batches[number][place] for place in part] for number, part in parts]
            try:
                scores, exits, fused = computed(partial(self._run_stages, run, packs, parts, setting))
            except OutOfMemory as error:
                number, part = max(parts, key=lambda item: len(item[1]))
                self._limit.halve([batches[number][place] for place in part], names[number][part[0]], error)
                continue
            self._limit.fitted()
            # A NaN score makes all fused scores of its query NaN, even if a deeper exit replaces the score itself.
            self._refuse_no_number(torch.stack([scores.double(), fused.double()]), list(chain(*names)))
            return list(map(ExitScore, scores.tolist(), exits.tolist(), fused.tolist()))

    def _parts(self, pairs: Sequence[TokenizedPair]) -> Iterator[list[int]]:
        """Places of a batch, in parts that fit as far as is known."""
        start = 0
        while start < len(pairs):
            part = self._that_fits(pairs, start)
            yield part
            start += len(part)

    def _that_fits(self, pairs: Sequence[TokenizedPair], start: int) -> list[int]:
        return next_batch(pairs, range(start, len(pairs)), self._limit.tokens)

    @torch.inference_mode()
    def _run_stages(
        self,
        run: Callable[[list[PackedStates], Parts], Stages],
        packs: Sequence[Sequence[TokenizedPair]],
        parts: Parts,
        setting: Setting,
    ) -> Stages:
        with self._adapted(setting.compress_ratio):
            states = [self._embed(pairs) for pairs in packs]
        return run(states, parts)

    def _read(self, states: PackedStates, layer: int, setting: Setting) -> torch.Tensor:
        with self._adapted(setting.compress_ratio):
            return self.model.scores(states, setting, (layer,))[0].cpu()

    def _refuse_no_number(self, scores: torch.Tensor, names: Sequence[int]) -> None:
        """Raise ArithmeticError if one of (exits, pairs) scores is not finite: no order would mean anything."""
        wrong = ~scores.isfinite()
        broken = wrong.any(0).nonzero()[:, 0].tolist()
        if broken:
            value = scores[:, broken[0]][wrong[:, broken[0]]][0].item()
            raise ArithmeticError(
                f"pair {names[broken[0]]} has a score that is {'not a number' if math.isnan(value) else value}, "
                f"computed in {self.model.dtype}"
                f"{f', and {len(broken) - 1} more in its batch' if len(broken) > 1 else ''}. float16 overflows where "
                "bfloat16 does not; or the weights are damaged."
            )

    @torch.inference_mode()
    def _forward(self, pairs: Sequence[TokenizedPair], setting: Setting) -> torch.Tensor:
        """(cutoff layers, pairs) float32 scores, on the model's device."""
        return self.model.scores(self._embed(pairs), setting)

    def _embed(self, pairs: Sequence[TokenizedPair]) -> PackedStates:
        decoder = self.model.model
        return decoder.embed(*pack_pairs(pairs, self.model.device, apart=decoder.batch_invariant))

    @contextmanager
    def _adapted(self, ratio: int) -> Iterator[None]:
        """Nobody else switches the token adapters meanwhile."""
        if not self._has_token_adapters:
            yield
            return
        with self._switching:
            use_token_adapter(self.model, ratio)
            yield
