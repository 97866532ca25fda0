"""What is measured: a model of some shape, groups of pairs, and the sub-networks it is trained under."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from flagembedding_matryoshka import Setting
from flagembedding_matryoshka.finetune.data import Group
from flagembedding_matryoshka.finetune.sampling import sample_setting
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.text.encoding import Ids
from flagembedding_matryoshka.text.pairs import Prefix, TokenizedPair

RATIOS = (1, 2, 4, 8)
QUERY_LENGTH, PASSAGE_LENGTHS, PROMPT_LENGTH = 32, (64, 192), 14
SEEDS = (14, 12, 0, 31, 3, 28, 8, 32)
"""Of sub-networks: with three compress layers these draws hold every ratio twice, and a layer in half of them."""


@dataclass(frozen=True)
class Job:
    """What a child process measures.

    Attributes:
        config: the shape of the model; layers are compressed after every `start_layer` of them.
        queries, group: pairs in a batch.
        steps: training steps, each under a sub-network of its own.
        compared: a name of `benchmarks.training.sides.COMPARISONS`.
    """

    config: CostWiseConfig
    queries: int
    group: int
    steps: int
    device: str
    threads: int
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    compared: str = "research code"

    @property
    def compress_layers(self) -> list[int]:
        return list(range(self.config.start_layer, self.config.num_hidden_layers, self.config.start_layer))

    @property
    def settings(self) -> list[Setting]:
        """One per step, the same for every job of a shape; FlagEmbedding's trainer knows full width alone."""
        if self.compared == "FlagEmbedding":
            return [Setting.resolve(self.config, self.config.exit_layers)] * self.steps
        seeds = itertools.islice(itertools.cycle(SEEDS), self.steps)
        return [sample_setting(self.config, self.compress_layers, RATIOS, seed, step=0) for seed in seeds]


def make_groups(job: Job) -> list[Group]:
    """Random tokens and teacher scores, as a dataset gives them: the pairs of a group share their query."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Ids:
        return torch.randint(1, job.config.vocab_size, (count,), generator=generator, dtype=torch.int32).numpy()

    shortest, longest = PASSAGE_LENGTHS
    groups: list[Group] = []
    for _ in range(job.queries):
        ids = tokens(QUERY_LENGTH)
        query = Prefix(ids, ids.tobytes())
        lengths = torch.randint(shortest, longest + 1, (job.group,), generator=generator).tolist()
        pairs = [TokenizedPair(query, tokens(length), tokens(PROMPT_LENGTH)) for length in lengths]
        groups.append(Group(pairs, torch.randn(job.group, generator=generator).tolist()))
    return groups


def pair_lengths(job: Job) -> list[int]:
    """Tokens of each pair, with its query."""
    return [len(pair) for group in make_groups(job) for pair in group.pairs]
