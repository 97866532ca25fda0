"""Scores of tokenised pairs by one model on one device."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratios, use_token_adapter
from flagembedding_matryoshka.inference.cascade import finish, run_cascade
from flagembedding_matryoshka.inference.deadline import AnytimeRun, Deadline
from flagembedding_matryoshka.inference.fusion import Fusion
from flagembedding_matryoshka.inference.memory import TokenLimit, as_shortage, keep_freed_memory
from flagembedding_matryoshka.inference.store import StoredPair
from flagembedding_matryoshka.models.batch import copy_to_host, pack_pairs
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.decoder import PackedStates
from flagembedding_matryoshka.models.flops import reading_share
from flagembedding_matryoshka.models.onednn import use_onednn
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.encoding import Ids
from flagembedding_matryoshka.text.pairs import TokenizedPair, count_tokens

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Task:
    """Pairs that one device scores together.

    Attributes:
        batches: the pairs of each batch, in the order in which they are packed.
        places: for each batch the number of each pair in its call.
        setting: depth, width and cascade.
        owners: for each batch the number of each pair's query, if candidates of a query are dropped by their scores.
            None: the task is one batch, whose pairs are all scored at all cutoff layers.
        deadline: deadline of the task's only query, which starts with the task if it has not started; None is none.
        fusion: first-stage scores by which candidates are dropped, too; None drops by the scores alone.
    """

    batches: Sequence[Sequence[TokenizedPair]]
    places: Sequence[Sequence[int]]
    setting: Setting
    owners: Sequence[Sequence[int]] | None = None
    deadline: Deadline | None = None
    fusion: Fusion | None = None


class TaskScores(NamedTuple):
    """The results of a task, pair after pair in the order of its batches.

    Attributes:
        scores: for each cutoff layer, in the order asked for, the score of each pair. If candidates are dropped, one
            list with the score of each pair at its exit.
        exits: the exit of each pair if candidates are dropped; otherwise empty.
        fused: the fused score of each pair if candidates are dropped, without fusion its score; otherwise empty.
    """

    scores: list[list[float]]
    exits: Sequence[int] = ()
    fused: Sequence[float] = ()


class Engine:
    """Runs tasks on the device of its model. It may be called from several threads.

    On a CPU, the process keeps the memory that a pass frees: see `keep_freed_memory`.

    Args:
        model: a model, which may have token adapters; each task uses the adapter of its ratio.
        compile: compile the layers.
    """

    def __init__(self, model: CostWiseForCausalLM, compile: bool = False) -> None:
        self.model = model
        if model.device.type == "cpu":
            keep_freed_memory()
            use_onednn(model.model.layers)
        if compile:
            model.model.compile_layers()
        self._ahead = 1 if model.device.type == "cuda" else 0
        self._adapted: Callable[[int], AbstractContextManager[Any]] = nullcontext
        if token_adapter_ratios(model):
            self._adapted = partial(_token_adapter, model, threading.Lock())
        self._limit = TokenLimit()
        self._limit_of_cascades = TokenLimit()

    def run(
        self, tasks: Iterable[Task], device: str | None = None, between_batches: Callable[[], None] | None = None
    ) -> Generator[tuple[Task, TaskScores], None, None]:
        """Yield each task with its results, in order. A GPU gets a task before the previous results are read.

        Args:
            device: the only device, or None. `WorkerPool.run` chooses a device by it.
            between_batches: as in `start`.
        """
        started: deque[tuple[Task, Callable[[], TaskScores]]] = deque()
        for task in tasks:
            started.append((task, self.start(task, between_batches)))
            if len(started) > self._ahead:
                earlier, result = started.popleft()
                yield earlier, result()
        for task, result in started:
            yield task, result()

    def close(self) -> None:
        """Return at once: an engine has no processes to end. `WorkerPool.close` has."""

    def start(self, task: Task, between_batches: Callable[[], None] | None = None) -> Callable[[], TaskScores]:
        """Queue a batch on the device and the copy of its scores, without waiting for them.

        For a task with `owners`, a GPU gets the first stage, and the later stages run when the results are waited for.
        On a CPU, or with a deadline, all stages run then.

        After an out-of-memory error, this and later batches are computed in smaller ones.

        Args:
            between_batches: called before each batch of a cascade's stages, or of the steps until a deadline. An
                exception ends them. None is no callback.

        Returns:
            A callable that blocks until the results are ready and returns them. It raises ArithmeticError if a score is
            not a finite number.

        Raises:
            torch.OutOfMemoryError: if a single pair does not fit.
        """
        if task.owners is not None:
            run = self._score_in_stages(task, task.owners, between_batches)
            if self._ahead and task.deadline is None:
                next(run)
            return partial(finish, run)
        (pairs,), (places,) = task.batches, task.places
        scores, start = [], 0
        while start < len(pairs):
            is_limited = self._limit.tokens < math.inf
            part = self._limit.take(pairs[start:]) if is_limited else pairs[start:]
            shortage = None
            try:
                with self._adapted(task.setting.compress_ratio), torch.inference_mode():
                    scores.append(self.model.scores(self._embed(part, task.setting), task.setting))
            except RuntimeError as error:
                shortage = as_shortage(error)
            if shortage is not None:
                self._limit.halve(part, places[start], shortage)
                continue
            if is_limited:
                self._limit.fitted()
            start += len(part)

        on_host = copy_to_host(torch.cat(scores, dim=1))

        def wait() -> TaskScores:
            found = on_host()
            if not found.isfinite().all():
                raise self._no_number(found, places)
            return TaskScores(found.tolist())

        return wait

    @torch.inference_mode()
    def _score_in_stages(
        self, task: Task, owners: Sequence[Sequence[int]], between: Callable[[], None] | None
    ) -> Generator[None, None, TaskScores]:
        """Score the pairs of a cascade, or of one query until a deadline. Yields as `run_cascade`.

        After an out-of-memory error all pairs start again, each half of the queries by itself, and those of a single
        query in smaller batches. Their order stays, also for `fusion`. A deadline stays, too.
        """
        setting = task.setting
        pairs_of_all, places_of_all = list(chain(*task.batches)), list(chain(*task.places))
        queries = list(dict.fromkeys(chain(*owners)))
        if len(queries) > 1 and sum(map(count_tokens, task.batches)) > self._limit_of_cascades.tokens:
            return (yield from self._in_halves(task, owners, queries, between))
        deadline = None if task.deadline is None else task.deadline.start()
        while True:
            is_limited = self._limit.tokens < math.inf
            parts: list[tuple[int, slice]] = []
            for number, pairs in enumerate(task.batches):
                start = 0
                while start < len(pairs):
                    fitting = self._limit.take(pairs[start:]) if is_limited else pairs[start:]
                    parts.append((number, slice(start, start + len(fitting))))
                    start += len(fitting)
            packs = [task.batches[number][part] for number, part in parts]
            of_packs = [owners[number][part] for number, part in parts]
            states: list[PackedStates] = []
            shortage = None
            try:
                with self._adapted(setting.compress_ratio):
                    states = [self._embed(pairs, setting) for pairs in packs]
                if deadline is None:
                    score = partial(self._read, setting, between)
                    scores, exits, fused = yield from run_cascade(score, states, of_packs, setting, task.fusion)
                else:
                    score, of_model = partial(self._read, setting, None), self.model.config
                    costs = of_model.exit_layers, reading_share(of_model)
                    scores, exits, fused = AnytimeRun(
                        score, states, setting, *costs, deadline, between, task.fusion
                    ).run()
            except RuntimeError as error:
                shortage = as_shortage(error)
            if shortage is not None:
                states = []
                if len(queries) > 1:
                    held = f", the states of a cascade of {len(queries)} queries"
                    self._limit_of_cascades.halve(pairs_of_all, places_of_all[0], shortage, held)
                    return (yield from self._in_halves(task, owners, queries, between))
                largest = max(range(len(packs)), key=lambda place: len(packs[place]))
                number, part = parts[largest]
                held = f", beside the states of {sum(map(count_tokens, packs))} tokens in the batches of its cascade"
                first = task.places[number][part.start]
                self._limit.halve(packs[largest], first, shortage, held if len(packs) > 1 else "")
                continue
            if is_limited:
                self._limit.fitted()
            if self._limit_of_cascades.tokens < math.inf:
                self._limit_of_cascades.fitted()
            # A NaN score makes all fused scores of its query NaN, even if a deeper exit replaces the score itself.
            both = torch.stack([scores.double(), fused.double()])
            if not both.isfinite().all():
                raise self._no_number(both, places_of_all)
            return TaskScores([scores.tolist()], exits.tolist(), fused.tolist())

    def _in_halves(
        self, task: Task, owners: Sequence[Sequence[int]], queries: Sequence[int], between: Callable[[], None] | None
    ) -> Generator[None, None, TaskScores]:
        """Score a cascade of several queries as two, one after the other."""
        first = set(queries[: len(queries) // 2])
        in_first = [[number in first for number in numbers] for numbers in owners]
        found: dict[bool, Iterator[tuple[float, int, float]]] = {}
        for half in (True, False):
            own = _of_queries(task, owners, in_first, half)
            assert own.owners is not None
            (scores,), exits, fused = yield from self._score_in_stages(own, own.owners, between)
            found[half] = iter(list(zip(scores, exits, fused, strict=True)))
        merged_scores, merged_exits, merged_fused = zip(*(next(found[half]) for half in chain(*in_first)), strict=True)
        return TaskScores([list(merged_scores)], merged_exits, merged_fused)

    def _read(
        self, setting: Setting, between: Callable[[], None] | None, states: PackedStates, layer: int
    ) -> torch.Tensor:
        """Run a batch up to an exit, and return its (sequences,) float32 scores there."""
        if between is not None:
            between()
        with self._adapted(setting.compress_ratio):
            return self.model.scores(states, setting, (layer,))[0]

    def _no_number(self, scores: torch.Tensor, places: Sequence[int]) -> ArithmeticError:
        """Return the error for (exits, pairs) scores that are not all finite: no order would mean anything."""
        wrong = ~scores.isfinite()
        broken = wrong.any(0).nonzero()[:, 0].tolist()
        value = scores[:, broken[0]][wrong[:, broken[0]]][0].item()
        return ArithmeticError(
            f"pair {places[broken[0]]} has a score that is {'not a number' if math.isnan(value) else value}, "
            f"computed in {self.model.dtype}"
            f"{f', and {len(broken) - 1} more in its batch' if len(broken) > 1 else ''}. float16 overflows where "
            "bfloat16 does not; or the weights are damaged."
        )

    @torch.inference_mode()
    def passage_states(self, passages: Sequence[Ids], setting: Setting) -> list[torch.Tensor]:
        """Compute the states of passages after the store layer of a setting, compressed there.

        Args:
            passages: the token ids of a batch, (tokens,) int32 each; a passage may have none.

        Returns:
            For each passage its (tokens, hidden) states, on the CPU.
        """
        decoder = self.model.model
        lengths = torch.tensor(list(map(len, passages)))
        none = torch.empty(0, self.model.config.hidden_size, dtype=decoder.embed_tokens.weight.dtype)
        found = [none] * len(passages)
        if lengths.any():
            token_ids = torch.from_numpy(np.concatenate(passages, dtype=np.int64))[None]
            with self._adapted(setting.compress_ratio):
                states = decoder.passage_states(token_ids, lengths[lengths > 0], setting)
            for place, own in zip(lengths.nonzero()[:, 0].tolist(), states, strict=True):
                found[place] = own.cpu()
        return found

    def _embed(self, pairs: Sequence[TokenizedPair], setting: Setting) -> PackedStates:
        """Return the states of a batch before the first layer."""
        decoder = self.model.model
        token_ids, packed = pack_pairs(pairs, self.model.device, apart=decoder.batch_invariant)
        stored = [pair.states for pair in pairs if isinstance(pair, StoredPair)]
        return decoder.embed(token_ids, packed, setting, stored or None)


@contextmanager
def _token_adapter(model: CostWiseForCausalLM, switching: threading.Lock, ratio: int) -> Iterator[None]:
    """Use the token adapter of a ratio inside. Other threads that switch adapters wait."""
    with switching:
        use_token_adapter(model, ratio)
        yield


def _of_queries(task: Task, owners: Sequence[Sequence[int]], chosen: Sequence[Sequence[bool]], value: bool) -> Task:
    """Return the task of those pairs of a cascade whose value in `chosen`, batch after batch, is `value`."""

    def of(batches: Sequence[Sequence[T]]) -> list[list[T]]:
        kept = [
            [one for one, is_chosen in zip(batch, of_batch, strict=True) if is_chosen == value]
            for batch, of_batch in zip(batches, chosen, strict=True)
        ]
        return [batch for batch in kept if batch]

    fusion = task.fusion
    if fusion is not None:
        everyone = zip(fusion.first_stage, chain(*chosen), strict=True)
        fusion = replace(fusion, first_stage=[score for score, is_chosen in everyone if is_chosen == value])
    return replace(task, batches=of(task.batches), places=of(task.places), owners=of(owners), fusion=fusion)
