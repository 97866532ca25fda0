"""Training rows: checked, cut into groups, joined into pairs."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from FlagEmbedding.abc.finetune.reranker import AbsLLMRerankerTrainDataset, AbsRerankerDataArguments
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.finetune.losses import Reads
from flagembedding_matryoshka.finetune.rows import COLUMNS, INSTRUCTIONS, load_files, load_rows, sampled
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair
from flagembedding_matryoshka.text.templates import Template

RANDOM_MARGIN = 10.0
"""A random negative gets the row's lowest teacher score minus this margin, that is e^-10 of its softmax weight."""
DRAWS = 100
"""Number of attempts to draw a random negative before all distinct texts of the file are listed."""
ROWS_LOOKED_AT, PASSAGES_LOOKED_AT = 1000, 8
"""Of how many rows, and of how many passages of each, `MatryoshkaTrainDataset.cut_shares` speaks."""


class MatryoshkaDataset(AbsLLMRerankerTrainDataset):
    """Rows of training files, memory-mapped by `datasets`, as pairs of a query with some of its passages.

    Args:
        args: where the rows are and how pairs are joined; `args.knowledge_distillation` says whether teacher scores
            are read.
        seed: of all that is drawn.
        template: the words around query and passage; a row may bring its own prompt, instructions and `instruction`.

    Lengths are those of the reference for a template that has them, see `Template.has_reference_lengths`. For any other
    `query_max_len` and `passage_max_len` count the user's text, and the template comes on top.

    Raises:
        ValueError: naming file and line of a row that is wrong, or if there is no row.
    """

    def __init__(
        self,
        args: AbsRerankerDataArguments,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 42,
        template: Template | None = None,
    ) -> None:
        self.seed = seed
        self._file_sizes: list[int] = []
        self.pair_tokenizer = PairTokenizer(tokenizer, template)
        args = copy.copy(args)
        args.sep_token = self.pair_tokenizer.template.between  # FlagEmbedding's dataset tokenises it
        load_files(args.train_data, self.reads(args), args.cache_path, args.skip_bad_lines, self.min_negatives(args))
        super().__init__(args, tokenizer)

    @classmethod
    def reads(cls, args: AbsRerankerDataArguments) -> Reads:
        """What of the rows."""
        return "scores" if args.knowledge_distillation else "labels"

    @classmethod
    def min_negatives(cls, args: AbsRerankerDataArguments) -> int:
        """Return the least length of a row's `neg`, see `row_fault`."""
        return 1

    def _load_dataset(self, file_path: str) -> Dataset:
        args = self.args
        rows = load_rows(file_path, self.reads(args), args.cache_path, args.skip_bad_lines, self.min_negatives(args))
        rows = sampled(rows, file_path, self.args.max_example_num_per_dataset, self.seed)
        self._file_sizes.append(len(rows))
        return rows

    def _sequences(self, row: dict[str, Any], passages: list[str]) -> list[TokenizedPair]:
        own = {name: row[column] for column, name in INSTRUCTIONS.items() if row.get(column)}
        template = replace(self.pair_tokenizer.template, **own).with_instruction(None)
        pairs = [(row["query"], passage) for passage in passages]
        if not self.pair_tokenizer.template.has_reference_lengths:
            return self.pair_tokenizer.build_texts(pairs, self.args.query_max_len, self.args.passage_max_len, template)
        return self.pair_tokenizer.build(
            pairs,
            self.args.query_max_len,
            self.args.passage_max_len + self.args.query_max_len // 2,
            self.max_length - len(self.pair_tokenizer.prompt_ids(template)),
            template,
        )


class MatryoshkaTrainDataset(MatryoshkaDataset):
    """Groups of a query with one positive, first, and `train_group_size - 1` negatives.

    What is drawn is a function of (seed, epoch, item) alone: a resumed run, and any number of processes, draw the same.

    Attributes:
        others: column of the rows that `random_negatives` are drawn from.

    Raises:
        ValueError: if a file has too few distinct texts for the random negatives of one of its rows.
    """

    others = "pos"

    def __init__(
        self,
        args: AbsRerankerDataArguments,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 42,
        template: Template | None = None,
    ) -> None:
        super().__init__(args, tokenizer, seed, template)
        starts = accumulate(self._file_sizes, initial=0)
        self._files = [(start, size) for start, size in zip(starts, self._file_sizes, strict=False) if size]
        self._texts_of_files: dict[int, dict[str, str]] = {}
        # Shared with the workers of a data loader, which may live longer than an epoch.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @classmethod
    def min_negatives(cls, args: AbsRerankerDataArguments) -> int:
        """Return 0 if all negatives of a group are passages of other rows."""
        return int(_count_random_negatives(args) < args.train_group_size - 1)

    def _load_dataset(self, file_path: str) -> Dataset:
        rows = super()._load_dataset(file_path)
        if self.args.random_negatives:
            self._refuse_few_texts(rows, file_path)
        return rows

    def _refuse_few_texts(self, rows: Dataset, path: str) -> None:
        """Raise ValueError if the file has too few texts for the random negatives of one of its rows."""
        wanted = _count_random_negatives(self.args)
        own_columns = [
            rows.data.column(name) for name in COLUMNS[self.reads(self.args)] if not name.endswith("_scores")
        ]
        longest = 1 + sum(pc.max(pc.list_value_length(column)).as_py() or 0 for column in own_columns)
        texts: set[str] = set()
        for row in rows:
            texts.update(map(_normalize, row[self.others]))
            if len(texts) >= wanted + longest:
                return
        for number, row in enumerate(rows):
            available = len(texts - self._own_texts(row))
            if available < wanted:
                raise ValueError(
                    f"random_negatives={self.args.random_negatives} takes {wanted} passages of other rows into a group "
                    f"of {self.args.train_group_size}, but {path} has {available} that are not in row {number} itself "
                    f"(rows counted from 0; query {row['query']!r:.80}). Lower random_negatives, or add rows."
                )

    def _own_texts(self, row: dict[str, Any]) -> set[str]:
        """Return the normalised texts that must not be random negatives of the row."""
        return set(map(_normalize, (row["query"], *self.passages_of(row))))

    def passages_of(self, row: dict[str, Any]) -> list[str]:
        """All of them."""
        return [*row["pos"], *row["neg"]]

    def cut_shares(self) -> tuple[float, float, int]:
        """Tokenise rows at even distances, always the same, and the first passages of each.

        Returns:
            the shares of their queries and of their passages that are cut, in [0, 1], and how many rows these are.
        """
        items = range(0, len(self), math.ceil(len(self) / ROWS_LOOKED_AT))
        queries, passages = [], []
        for item in items:
            row = self.dataset[item]
            pairs = self._sequences(row, self.passages_of(row)[:PASSAGES_LOOKED_AT])
            queries.append(pairs[0].query_is_cut)
            passages += [pair.passage_is_cut for pair in pairs]
        return sum(queries) / len(queries), sum(passages) / len(passages), len(items)

    def start_epoch(self, epoch: int) -> None:
        """Draw other positives and negatives than in other epochs.

        Not called `set_epoch`: accelerate calls a method of that name in a run of one process alone.
        """
        self.epoch.fill_(epoch)

    def __getitem__(self, item: int) -> tuple[list[TokenizedPair], list[float] | None]:
        """The pairs of the group, and their teacher scores."""
        row, args = self.dataset[item], self.args
        draw = random.Random(f"{self.seed}-{int(self.epoch)}-{item}")
        positive = draw.randrange(len(row["pos"]))
        others = self._passages_of_others(item, row, draw)
        negatives = _sample(len(row["neg"]), args.train_group_size - 1 - len(others), draw)
        passages = [self._in_pieces(row["pos"][positive], draw), *(row["neg"][index] for index in negatives), *others]
        scores = None
        if args.knowledge_distillation:
            scores = [row["pos_scores"][positive], *(row["neg_scores"][index] for index in negatives)]
            lowest = min([*row["pos_scores"], *row["neg_scores"]])
            scores += [lowest - RANDOM_MARGIN] * len(others)
        return self._sequences(row, passages), scores

    def _passages_of_others(self, item: int, row: dict[str, Any], draw: random.Random) -> list[str]:
        """Draw the random negatives of a group from other rows of the same file.

        They differ from each other, from all passages of the row and from its query. The comparison ignores white space
        and case.
        """
        first, size = next((first, size) for first, size in self._files if item < first + size)
        taken = self._own_texts(row)
        others: list[str] = []
        while len(others) < _count_random_negatives(self.args):
            for _ in range(DRAWS):
                passage = draw.choice(self.dataset[first + draw.randrange(size)][self.others])
                if _normalize(passage) not in taken:
                    break
            else:
                # The file repeats few texts. `_refuse_few_texts` has found that there are enough of them.
                texts = self._texts_of_file(first, size)
                passage = draw.choice([text for key, text in texts.items() if key not in taken])
            taken.add(_normalize(passage))
            others.append(passage)
        return others

    def _texts_of_file(self, first: int, size: int) -> dict[str, str]:
        """Return the distinct texts of rows `first` to `first + size - 1` by their normalised form."""
        if first not in self._texts_of_files:
            rows = self.dataset.select(range(first, first + size))
            self._texts_of_files[first] = {_normalize(text): text for row in rows for text in row[self.others]}
        return self._texts_of_files[first]

    def _in_pieces(self, text: str, draw: random.Random) -> str:
        """FlagEmbedding's `shuffle_ratio`: that share of the positives has its thirds in another order."""
        if len(text) <= 100 or draw.random() >= self.args.shuffle_ratio:
            return text
        size = len(text) // 3 + 1
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        return " ".join(draw.sample(pieces, len(pieces)))


class UnlabelledTrainDataset(MatryoshkaTrainDataset):
    """Groups of a query with `train_group_size` passages, in any order, which a teacher alone judges."""

    others = "passages"

    @classmethod
    def reads(cls, args: AbsRerankerDataArguments) -> Reads:
        """What of the rows."""
        return "passages"

    def passages_of(self, row: dict[str, Any]) -> list[str]:
        """All of them."""
        return row["passages"]

    def __getitem__(self, item: int) -> tuple[list[TokenizedPair], None]:
        """The pairs of the group; there are no teacher scores in the data."""
        row, args = self.dataset[item], self.args
        draw = random.Random(f"{self.seed}-{int(self.epoch)}-{item}")
        own = self.passages_of(row)
        others = self._passages_of_others(item, row, draw)
        drawn = _sample(len(own), args.train_group_size - len(others), draw)
        return self._sequences(row, [*(own[index] for index in drawn), *others]), None


def _count_random_negatives(args: AbsRerankerDataArguments) -> int:
    """Return the number of random negatives in a group."""
    return round(args.random_negatives * (args.train_group_size - 1))


def _normalize(text: str) -> str:
    """Return the text with case folded and each run of white space as one space."""
    return " ".join(text.split()).casefold()


def _sample(size: int, wanted: int, draw: random.Random) -> list[int]:
    """Draw `wanted` of `size` indices, each at most ceil(wanted / size) times."""
    if not wanted:
        return []
    return draw.sample(list(range(size)) * math.ceil(wanted / size), wanted)


class MatryoshkaEvalDataset(MatryoshkaDataset):
    """Queries with all of their positives and negatives, to be ranked."""

    def __getitem__(self, item: int) -> tuple[list[TokenizedPair], list[float] | None]:
        """The pairs of the list, and their labels, 1 on positives."""
        row = self.dataset[item]
        return self._sequences(row, [*row["pos"], *row["neg"]]), [1.0] * len(row["pos"]) + [0.0] * len(row["neg"])
