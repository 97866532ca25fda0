"""Deadlines of rankings: all candidates are scored at the first exit, then the best ones as deep as time allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from flagembedding_matryoshka.inference.fusion import Fusion, best_first
from flagembedding_matryoshka.inference.inputs import excerpt
from flagembedding_matryoshka.models.batch import compressed_lengths
from flagembedding_matryoshka.models.decoder import PackedStates
from flagembedding_matryoshka.setting import Setting, share_of

STOPS = 7
"""Exits where candidates of a query with a deadline stop, at most; with fewer exits, all of them."""


@dataclass(frozen=True)
class Deadline:
    """A deadline, a number of seconds after its start.

    Attributes:
        seconds: above 0; math.inf is no limit.
        clock: returns seconds. It must be the same in all processes of the machine.
        end: the clock's value at the deadline; None before the start.
    """

    seconds: float
    clock: Callable[[], float] = time.monotonic
    end: float | None = None

    @classmethod
    def of(cls, deadline_ms: float, clock: Callable[[], float]) -> Deadline:
        """Return the deadline for the argument of `MatryoshkaReranker.rank`, not started.

        Raises:
            TypeError: if `deadline_ms` is not a number.
            ValueError: if it is not above 0.
        """
        if not isinstance(deadline_ms, Real) or isinstance(deadline_ms, bool):
            raise TypeError(f"deadline_ms must be a number, or None for no deadline, got {excerpt(deadline_ms)}.")
        if not deadline_ms > 0:
            raise ValueError(f"deadline_ms is {deadline_ms!r}, but must be above 0, or None for no deadline.")
        return cls(float(deadline_ms) / 1000, clock)

    def start(self) -> Deadline:
        """Return the deadline, started now if it has not started."""
        return self if self.end is not None else replace(self, end=self.clock() + self.seconds)

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.seconds if self.end is None else self.end - self.clock()


class Pace:
    """Predicts the time of layers from the measured ones: a time for each layer, and a time for each token in it.

    Both come from a least-squares line through the measurements. Neither is negative.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._count = 0
        self._mean_tokens = self._mean_seconds = self._spread = self._rise = 0.0
        self._of_layer = self._of_token = 0.0

    @contextmanager
    def measured(self, layers: float, tokens: float) -> Iterator[None]:
        """Measure the code inside, which runs `layers` layers with `tokens` tokens in all of them together."""
        start = self._clock()
        yield
        self._fit(tokens / layers, (self._clock() - start) / layers)

    def _fit(self, tokens: float, seconds: float) -> None:
        """Fit the line to one more layer with `tokens` tokens. The means and sums are running ones (Welford, 1962)."""
        self._count += 1
        beyond = tokens - self._mean_tokens
        self._mean_tokens += beyond / self._count
        self._mean_seconds += (seconds - self._mean_seconds) / self._count
        self._spread += beyond * (tokens - self._mean_tokens)
        self._rise += beyond * (seconds - self._mean_seconds)
        slope = self._rise / self._spread if self._spread else math.inf
        if slope * self._mean_tokens > self._mean_seconds:
            self._of_layer, self._of_token = 0.0, self._mean_seconds / self._mean_tokens
        else:
            self._of_token = max(0.0, slope)
            self._of_layer = self._mean_seconds - self._of_token * self._mean_tokens

    def seconds(self, layers: float, tokens: float) -> float:
        """Return the predicted seconds of layers; 0 before the first measurement."""
        return layers * self._of_layer + tokens * self._of_token


@dataclass(eq=False)
class CandidateBatch:
    """Candidates that have run the same layers, in one batch.

    Attributes:
        states: the states, with a sequence for each candidate.
        places: the index of each candidate among all candidates of the query.
    """

    states: PackedStates
    places: list[int]

    def select(self, chosen: list[bool]) -> CandidateBatch:
        """Return the chosen candidates; the batch itself if all are chosen."""
        if all(chosen):
            return self
        indices = [index for index, is_chosen in enumerate(chosen) if is_chosen]
        return CandidateBatch(self.states.select(indices), [self.places[index] for index in indices])

    @property
    def tokens(self) -> int:
        """Number of tokens in the batch."""
        return self.states.packed.total_tokens


class AnytimeRun:
    """One query's candidates, scored as deep as a deadline allows.

    Runs cascades of doubling width. Each one continues where the previous one stopped. The first one has a third of the
    candidates, or one batch if that is less. Within a cascade, half as many candidates reach an exit that is twice as
    deep (successive halving, arXiv 1502.07943). Candidates at one exit run in full batches, whatever batches they came
    from. At most `STOPS` exits are used, and the cascade's.
    The order of the steps does not depend on the deadline, so a later deadline makes no candidate less deep. If the
    time is enough for all remaining work, this work is the next step.

    Args:
        score: runs candidates up to an exit and returns their (sequences,) float32 scores there, on any device.
        batches: candidates before the first layer.
        setting: with one cutoff layer, the deepest exit; its cascade limits the number of candidates that go deeper.
        exits: the model's exits, ascending; `choose_stops` chooses among them.
        reading: cost of reading scores at a layer, relative to running the layer.
        deadline: a deadline that has started.
        between: called before each call of `score`; None is no callback.
        fusion: candidates with the highest fused scores at an exit go deeper first; z is taken over the candidates that
            wait there. None ranks them by their scores.
    """

    def __init__(
        self,
        score: Callable[[PackedStates, int], Tensor],
        batches: Sequence[PackedStates],
        setting: Setting,
        exits: Sequence[int],
        reading: float,
        deadline: Deadline,
        between: Callable[[], None] | None,
        fusion: Fusion | None = None,
    ) -> None:
        self._score = score
        self._setting = setting
        self._exits = choose_stops(setting.readable(exits), dict(setting.cascade))
        self._reading = reading
        self._deadline = deadline
        self._between = between
        self._fusion = fusion
        self._pace = Pace(deadline.clock)
        sizes = [len(states.packed.sequences) for states in batches]
        places = torch.arange(sum(sizes)).split(sizes)
        self._most_sequences = max(sizes)
        self._batches = [CandidateBatch(states, own.tolist()) for states, own in zip(batches, places, strict=True)]
        self._most_tokens = max(batch.tokens for batch in self._batches)
        # By the index of a candidate: its score, and the exit where it was read.
        self._scores, self._reached = torch.zeros(sum(sizes)), torch.zeros(sum(sizes), dtype=torch.long)
        self._first_width = min(max(sizes), math.ceil(sum(sizes) / 3))
        self._most = [_most(setting, layer, sum(sizes)) for layer in self._exits]

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Score as deep as the deadline allows.

        Returns:
            For all sequences, batch after batch, on the CPU: (sequences,) float32 scores, (sequences,) int64 exits
            where they were read, and (sequences,) float64 fused scores. z of a fused score is taken over the candidates
            that stopped at the same exit. Without fusion the scores stand in their place.
        """
        self._go_deeper()
        fused = self._scores if self._fusion is None else torch.zeros(len(self._scores), dtype=torch.float64)
        if self._fusion is not None:
            for layer in self._reached.unique():
                places = (self._reached == layer).nonzero()[:, 0]
                fused[places] = self._fusion.fuse(self._scores, places)
        return self._scores, self._reached, fused

    def _go_deeper(self) -> None:
        """Run steps until the deadline."""
        for batch in self._batches:
            if self._between is not None:
                self._between()
            self._advance(batch, self._exits[0])
        for numbers in self._rounds():
            for index in range(len(self._exits) - 1):
                if not self._bring(index, numbers):
                    return

    def _rounds(self) -> Iterator[list[int]]:
        """Yield, for one cascade after the other, the number of candidates that reach each exit."""
        width, numbers = self._first_width, list[int]()
        while numbers != self._most:
            if self._seconds_of_all() <= self._deadline.left:
                numbers = self._most
            else:
                wide = [math.ceil(width * self._exits[1] / layer) for layer in self._exits[1:]]
                numbers = [len(self._scores), *map(min, wide, self._most[1:])]
            yield numbers
            width *= 2

    def _bring(self, index: int, numbers: Sequence[int]) -> bool:
        """Run the best candidates at an exit to a deeper one.

        They run on to the first deeper exit where some of them stop in this cascade.

        Args:
            index: index of the exit where the candidates wait.
            numbers: for each exit, the number of candidates that reach it in this cascade.

        Returns:
            False if the time is too short for a batch.
        """
        layer = self._exits[index]
        missing = numbers[index + 1] - int((self._reached > layer).sum())
        if missing <= 0:
            return True
        deeper = range(index + 1, len(self._exits) - 1)
        goal = self._exits[next((exit for exit in deeper if numbers[exit + 1] < numbers[exit]), -1)]
        waiting = (self._reached == layer).nonzero()[:, 0]
        scores = self._scores[waiting]
        fused = scores if self._fusion is None else self._fusion.fuse(self._scores, waiting)
        best = waiting[best_first(fused, scores)][:missing].tolist()
        rank = {place: number for number, place in enumerate(best)}
        sources = [batch for batch in self._batches if not rank.keys().isdisjoint(batch.places)]
        sources.sort(key=lambda batch: min(rank.get(place, len(rank)) for place in batch.places))
        while sources:
            joined, going = self._full_batch(sources, rank.keys())
            seconds = self._pace.seconds(*self._work(going.states, goal))
            if seconds > self._deadline.left:
                return False  # at once: others that run first would make the answer later
            if self._between is not None:
                self._between()
                if seconds > self._deadline.left:
                    return False
            for batch in joined:
                sources.remove(batch)
                self._batches.remove(batch)
                if not rank.keys() >= set(batch.places):
                    self._batches.append(batch.select([place not in rank for place in batch.places]))
            self._batches.append(going)
            self._advance(going, goal)
        return True

    def _full_batch(
        self, sources: Sequence[CandidateBatch], chosen: Collection[int]
    ) -> tuple[list[CandidateBatch], CandidateBatch]:
        """Join the chosen candidates of several batches in one batch.

        Returns:
            The first `sources` whose chosen candidates fit together, and the batch of these candidates.
        """
        joined: list[CandidateBatch] = []
        going: list[CandidateBatch] = []
        for batch in sources:
            own = batch.select([place in chosen for place in batch.places])
            sequences = sum(len(other.places) for other in (own, *going))
            tokens = sum(other.tokens for other in (own, *going))
            if going and (sequences > self._most_sequences or tokens > self._most_tokens):
                break
            joined.append(batch)
            going.append(own)
        if len(going) == 1:
            return joined, going[0]
        states = PackedStates.concat([batch.states for batch in going])
        return joined, CandidateBatch(states, [place for batch in going for place in batch.places])

    def _advance(self, batch: CandidateBatch, goal: int) -> None:
        """Run a batch to an exit, and measure its time."""
        with self._pace.measured(*self._work(batch.states, goal)):
            self._scores[batch.places] = self._score(batch.states, goal).cpu()
        self._reached[batch.places] = goal

    def _seconds_of_all(self) -> float:
        """Return the predicted seconds until all candidates are as deep as they may go."""

        def share(layer: int) -> float:
            return _most(self._setting, layer + 1, len(self._scores)) / len(self._scores)

        deepest = self._exits[-1]
        waiting = [batch for batch in self._batches if int(self._reached[batch.places[0]]) < deepest]
        return sum(self._pace.seconds(*self._work(batch.states, deepest, share)) for batch in waiting)

    def _work(
        self, states: PackedStates, goal: int, share: Callable[[int], float] = lambda layer: 1.0
    ) -> tuple[float, float]:
        """Return the number of layers that bring candidates to an exit, and the number of tokens in all of them.

        Args:
            goal: the exit, whose layer runs for the last tokens alone.
            share: the fraction of candidates that go through a layer. A layer counts as this fraction of a layer.
        """
        layers = tokens = 0.0
        packed = states.packed
        fixed, passage = int((packed.query_lengths + packed.prompt_lengths).sum()), packed.passage_lengths
        for layer in range(states.layers_run + 1, goal + 1):
            weight = share(layer) * (1.0 if layer < goal else self._reading)
            layers += weight
            split = states.split if layer <= self._setting.store_layer else None
            tokens += weight * (fixed + int(passage.sum()) if split is None else split.batch.total_tokens)
            is_stored = split is not None and split.stored is not None
            if self._setting.compresses_after(layer) and not is_stored:
                passage = compressed_lengths(passage, self._setting.compress_ratio)
        return layers, tokens


def choose_stops(exits: Sequence[int], cascade: Collection[int]) -> list[int]:
    """Return the exits where candidates stop: at most `STOPS`, their depths a geometric series, and the cascade's.

    Each exit costs a batch in each cascade of `AnytimeRun`. A cascade of all exits of a deep model would run batches of
    few candidates.

    >>> choose_stops(range(4, 33), {20: 0.5})
    [4, 6, 8, 11, 16, 20, 23, 32]
    """
    if len(exits) <= STOPS:
        return list(exits)
    first, last = exits[0], exits[-1]
    wanted = [first * (last / first) ** (number / (STOPS - 1)) for number in range(STOPS)]
    stops = {min(exits, key=lambda layer: abs(layer - depth)) for depth in wanted}
    return sorted(stops.union(cascade))


def _most(setting: Setting, layer: int, candidates: int) -> int:
    """Return the number of candidates that may reach a layer after the cascade's earlier stages."""
    return min([candidates, *(share_of(share, candidates) for stage, share in setting.cascade if stage < layer)])
