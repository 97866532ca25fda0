"""Which process gets which rows of a step: each about as many tokens, so that none waits long for the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

from flagembedding_matryoshka.finetune.data import MatryoshkaTrainDataset

BYTES_PER_TOKEN = 4
"""Of UTF-8, about, in any language: what a row takes is guessed before it is drawn and tokenised."""


class BalancedSampler(Sampler[int]):
    """A random order of rows, a function of (seed, epoch) alone, in which those of each step are dealt out by length.

    A step has the rows that it would have without this. They are sorted and cut into passes, and each pass is dealt
    out to the processes, which take `batch_size` rows in turn.

    Args:
        seed: of the order, as accelerate draws it.
        batch_size, processes, passes: rows of a process in a pass, processes, and passes to a step.
    """

    def __init__(
        self, dataset: MatryoshkaTrainDataset, seed: int, batch_size: int, processes: int, passes: int = 1
    ) -> None:
        self.dataset = dataset
        self.order = SeedableRandomSampler(dataset, data_seed=seed)
        self.batch_size, self.processes, self.passes = batch_size, processes, passes

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        self.order.set_epoch(int(self.dataset.epoch))
        rows = iter(self.order)
        size = self.batch_size * self.processes
        while step := list(islice(rows, size * self.passes)):
            if len(step) < size * self.passes:
                yield from step
                return
            weights = {row: self._weight(row) for row in step}
            step.sort(key=lambda row: -weights[row])
            for start in range(0, len(step), size):
                part = step[start : start + size]
                for share in deal([weights[row] for row in part], self.processes):
                    yield from (part[place] for place in share)

    def _weight(self, item: int) -> float:
        """About how many tokens the group of a row has."""
        row, args = self.dataset.dataset[item], self.dataset.args
        passages = self.dataset.passages_of(row)
        mean = sum(_tokens(passage, args.passage_max_len) for passage in passages) / len(passages)
        return _tokens(row["query"], args.query_max_len) + args.train_group_size * mean


def _tokens(text: str, limit: int) -> float:
    return min(len(text.encode(errors="replace")) / BYTES_PER_TOKEN, limit)


def deal(weights: Sequence[float], shares: int) -> list[list[int]]:
    """Places of `weights`, the heaviest first, in so many shares of one size, whose sums are close to each other.

    >>> deal([9.0, 5.0, 4.0, 3.0, 2.0, 1.0], 2)
    [[0, 3, 5], [1, 2, 4]]
    """
    size = len(weights) // shares
    dealt: list[list[int]] = [[] for _ in range(shares)]
    for place in sorted(range(len(weights)), key=lambda place: -weights[place]):
        open_shares = [share for share in dealt if len(share) < size]
        min(open_shares, key=lambda share: sum(weights[each] for each in share)).append(place)
    return dealt
