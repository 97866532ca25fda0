"""Progressive dropping: after an exit the worst candidates of a query stop, and only the others go deeper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig, SubNetwork
from flagembedding_matryoshka.models.decoder import PackedStates


@dataclass(frozen=True)
class Schedule:
    """After which exits how much of all candidates goes on.

    Attributes:
        stages: (exit, share of all candidates that go deeper), from the shallowest.
        final: the exit that the last ones are scored at.
    """

    stages: tuple[tuple[int, float], ...]
    final: int

    @classmethod
    def resolve(cls, config: CostWiseConfig, cascade: Mapping[int, float], final: int) -> Schedule:
        """Check `cascade`, {exit: share of all candidates that go deeper}.

        Raises:
            ValueError: if an exit does not exist or is no shallower than `final`, or a share is not in (0, 1] or
                exceeds the one before it.
        """
        stages = tuple(sorted(cascade.items()))
        before = 1.0
        for layer, share in stages:
            if layer not in config.exit_layers or layer >= final:
                possible = [exit_layer for exit_layer in config.exit_layers if exit_layer < final]
                raise ValueError(f"cascade drops candidates after layer {layer}, but must do so at one of {possible}.")
            if not 0 < share <= before:
                raise ValueError(
                    f"cascade keeps {share} of all candidates after layer {layer}: shares lie in (0, 1] and do not "
                    f"rise; the one before is {before}."
                )
            before = share
        return cls(stages, final)

    def kept(self, candidates: int) -> int:
        """How many of so many candidates reach the end, at least one."""
        return math.ceil(self.stages[-1][1] * candidates) if self.stages else candidates


def run_cascade(
    model: CostWiseForCausalLM,
    batches: Sequence[PackedStates],
    queries: Sequence[Sequence[int]],
    schedule: Schedule,
    sub_network: SubNetwork,
) -> tuple[Tensor, Tensor]:
    """Score candidates, dropping the worst of each query after each stage.

    Args:
        batches: candidates before the first layer; `queries` says whose they are.
        queries: for each batch the number of each sequence's query.
        sub_network: width, and `schedule.final` as its depth.

    Returns:
        for all sequences, batch after batch: (sequences,) float32 scores and (sequences,) int64 exits where they were
        read, both on the CPU.
    """
    sizes = [len(numbers) for numbers in queries]
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1].tolist()
    owner = torch.tensor([number for numbers in queries for number in numbers])
    scores, exits = torch.zeros(len(owner)), torch.zeros(len(owner), dtype=torch.long)
    alive = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    states = list(batches)
    for layer, share in (*schedule.stages, (schedule.final, None)):
        for index, sequences in enumerate(alive):
            if not sequences:
                continue
            scores[sequences] = model.scores(states[index], sub_network, (layer,))[0].cpu()
            exits[sequences] = layer
        if share is None:
            break
        going_on = _best_of_each_query(scores, exits == layer, owner, share)
        for index, sequences in enumerate(alive):
            places = [place for place, sequence in enumerate(sequences) if going_on[sequence]]
            if len(places) < len(sequences):
                alive[index] = [sequences[place] for place in places]
                states[index] = states[index].select(places) if places else states[index]
    return scores, exits


def _best_of_each_query(scores: Tensor, running: Tensor, owner: Tensor, share: float) -> Tensor:
    """(sequences,) bool: the running sequences that are among the best `share` of all of their query's."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    for query in owner.unique():
        mine = torch.nonzero((owner == query) & running)[:, 0]
        count = math.ceil(share * int((owner == query).sum()))
        chosen[mine[scores[mine].argsort(descending=True, stable=True)[:count]]] = True
    return chosen
