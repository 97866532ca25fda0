"""Draws of a training step: its setting, and the rows of each process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

from flagembedding_matryoshka.finetune.data import MatryoshkaTrainDataset
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import Setting

BYTES_PER_TOKEN = 4
"""Estimate in UTF-8 for any language: rows are distributed before their passages are drawn and tokenised."""


def sample_setting(
    config: CostWiseConfig,
    compress_layers: Sequence[int],
    compress_ratios: Sequence[int],
    seed: int,
    step: int,
    store_layers: Sequence[int] = (),
) -> Setting:
    """Draw the setting of a pass: all exits, each compress layer with probability 1/2, and a uniform ratio.

    With `store_layers`, also draw one of these or none, uniformly. The setting of a store layer has the exits above it,
    and compresses after it instead of below it.

    The draw is a function of (seed, step). So all processes run the same layers in the same order; otherwise processes
    with sharded weights would wait for each other forever.

    Args:
        config: configuration of the model.
        compress_layers: layers to draw from.
        compress_ratios: ratios to draw from.
        seed: the seed.
        step: number of forward passes before this one.
        store_layers: store layers to draw from; empty is none.

    Raises:
        ValueError: if the model has no such layer or ratio, or no exit above a store layer.
    """
    draw = random.Random(f"{seed}-{step}")
    ratio = draw.choice(list(compress_ratios))
    layers = [layer for layer in compress_layers if draw.random() < 0.5]
    store = draw.choice([0, *store_layers]) if store_layers else 0
    if store:
        layers = [store, *(layer for layer in layers if layer > store)]
    exits = [layer for layer in config.exit_layers if layer > store]
    return Setting.resolve(config, exits or None, layers, ratio if layers else 1, store_layer=store)


class OneSourceSampler(Sampler[int]):
    """A random order in which rows that lie in one batch are of one file, as far as the file fills it.

    The order is a function of (seed, epoch). Rows that fill no batch of their own file come at the end, mixed.

    Args:
        files: the first row of each file, and its number of rows.
        batch_size: rows of a pass of all processes.
        seed: the seed.
    """

    def __init__(self, files: Sequence[tuple[int, int]], batch_size: int, seed: int) -> None:
        self.files, self.batch_size, self.seed, self.epoch = files, batch_size, seed, 0

    def __len__(self) -> int:
        return sum(size for _, size in self.files)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}-{self.epoch}")
        batches: list[list[int]] = []
        rest: list[int] = []
        for start, size in self.files:
            rows = draw.sample(range(start, start + size), size)
            whole = size // self.batch_size * self.batch_size
            batches += [rows[place : place + self.batch_size] for place in range(0, whole, self.batch_size)]
            rest += rows[whole:]
        draw.shuffle(batches)
        draw.shuffle(rest)
        yield from chain.from_iterable([*batches, rest])


class BalancedSampler(Sampler[int]):
    """A random order of rows that gives each process about the same number of tokens in a step.

    A step has the same rows as in the given order. They are sorted by length and split into passes, and the rows of a
    pass are distributed to the processes.

    Args:
        dataset: the rows.
        order: the random order, a function of the epoch.
        batch_size: rows of a process in a pass.
        processes: number of processes.
        passes: passes in a step.
    """

    def __init__(
        self,
        dataset: MatryoshkaTrainDataset,
        order: SeedableRandomSampler | OneSourceSampler,
        batch_size: int,
        processes: int,
        passes: int = 1,
    ) -> None:
        self.dataset = dataset
        self.order = order
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
                rows_of_pass = step[start : start + size]
                for indices in distribute([weights[row] for row in rows_of_pass], self.processes):
                    yield from (rows_of_pass[index] for index in indices)

    def _weight(self, item: int) -> float:
        """Estimate the number of tokens in the group of a row."""
        row, args = self.dataset.dataset[item], self.dataset.args
        passages = self.dataset.passages_of(row)
        mean = sum(_tokens(passage, args.passage_max_len) for passage in passages) / len(passages)
        return _tokens(row["query"], args.query_max_len) + args.train_group_size * mean


def _tokens(text: str, limit: int) -> float:
    return min(len(text.encode(errors="replace")) / BYTES_PER_TOKEN, limit)


def distribute(weights: Sequence[float], count: int) -> list[list[int]]:
    """Distribute the indices of `weights` to lists of the same length with similar sums of weights, heaviest first.

    Args:
        weights: weights, in a number that is a multiple of `count`.
        count: number of lists.

    >>> distribute([9.0, 5.0, 4.0, 3.0, 2.0, 1.0], 2)
    [[0, 3, 5], [1, 2, 4]]
    """
    size = len(weights) // count
    lists: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        unfilled = [indices for indices in lists if len(indices) < size]
        min(unfilled, key=lambda indices: sum(weights[each] for each in indices)).append(index)
    return lists
