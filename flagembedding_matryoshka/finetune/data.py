"""Data sets of tokenised groups, and their collation into one packed row without padding."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple

import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from FlagEmbedding.abc.finetune.reranker import AbsLLMRerankerTrainDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.finetune.rows import COLUMNS, TEXTS, load_files, mix_rows, sample_rows
from flagembedding_matryoshka.mining.rows import INSTRUCTIONS, RowKind
from flagembedding_matryoshka.models.batch import PackedBatch, pack_pairs
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair
from flagembedding_matryoshka.text.templates import Template

RANDOM_MARGIN = 10.0
"""A random negative gets the row's lowest teacher score minus this margin, that is e^-10 of its softmax weight."""
DRAWS = 100
"""Number of attempts to draw a random negative before all distinct texts of the file are listed."""
SAMPLED_ROWS, SAMPLED_PASSAGES = 1000, 8
"""Number of rows, and of passages of each row, that `MatryoshkaTrainDataset.truncated_shares` tokenises."""
PADDING = -100
"""Value after the end of a list in scores and labels, as `Trainer` pads them."""


class Group(NamedTuple):
    """The pairs of a query.

    Attributes:
        pairs: the pairs.
        scores: the teacher's score of each, None without a teacher.
        grades: the grade of each, at least 0; None if the first pair is the only positive, or there are no labels.
    """

    pairs: Sequence[TokenizedPair]
    scores: Sequence[float] | None = None
    grades: Sequence[float] | None = None


class MatryoshkaDataset(AbsLLMRerankerTrainDataset):
    """Rows of training files, memory-mapped by `datasets`, as tokenised pairs of a query and its passages.

    With a template of the reference (`Template.has_reference_lengths`), `query_max_len` and `passage_max_len` count as
    in the reference. With any other template they count the user's text, and the template comes on top.

    Args:
        args: `MatryoshkaDataArguments`, files and lengths. With `args.knowledge_distillation` the rows need teacher
            scores.
        tokenizer: the tokenizer.
        seed: seed of all draws.
        template: text around query and passage. A row may have its own prompt, instructions and `instruction`.

    Attributes:
        files: the first item of each file, and its number of items.

    Raises:
        ValueError: if a row has a fault, or no file has a row; names file and line.
    """

    def __init__(
        self,
        args: Any,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 42,
        template: Template | None = None,
    ) -> None:
        self.seed = seed
        self.pair_tokenizer = PairTokenizer(tokenizer, template)
        # FlagEmbedding's constructor reads JSON alone.
        self.args, self.tokenizer = args, tokenizer
        self.max_length = args.query_max_len + args.passage_max_len
        files = self.load_sources(args, seed)
        starts = accumulate(map(len, files), initial=0)
        self.files = [(start, len(rows)) for start, rows in zip(starts, files, strict=False)]
        self.dataset = concatenate_datasets([rows for rows in files if len(rows)])

    @classmethod
    def row_kind(cls, args: Any) -> RowKind:
        """Return the kind of row that is needed."""
        return "scores" if args.knowledge_distillation else "labels"

    @classmethod
    def min_negatives(cls, args: Any) -> int:
        """Return the least length of a row's `neg`, see `row_fault`."""
        return 1

    @classmethod
    def load_sources(cls, args: Any, seed: int) -> list[Dataset]:
        """Return the rows of each file that are used: at most `max_example_num_per_dataset`, by `data_weights`.

        Raises:
            ValueError: if a row has a fault, or no file has a row; names file and line.
        """
        options = args.cache_path, args.skip_bad_lines, cls.min_negatives(args), args.column_mapping
        files = load_files(args.train_data, cls.row_kind(args), *options)
        limit = args.max_example_num_per_dataset
        files = [sample_rows(rows, path, limit, seed) for path, rows in zip(args.train_data, files, strict=True)]
        return files if args.data_weights is None else mix_rows(files, args.data_weights, seed)

    def _pairs(self, row: dict[str, Any], passages: list[str]) -> list[TokenizedPair]:
        """Tokenise a row's query with passages, in the row's own template and within the lengths of the class."""
        own = {name: row[column] for column, name in INSTRUCTIONS.items() if row.get(column)}
        template = replace(self.pair_tokenizer.template, **own).with_instruction(None)
        pairs = [(row["query"], passage) for passage in passages]
        if not self.pair_tokenizer.template.has_reference_lengths:
            return self.pair_tokenizer.build_texts(pairs, self.args.query_max_len, self.args.passage_max_len, template)
        return self.pair_tokenizer.build(
            pairs,
            self.args.query_max_len,
            self.args.passage_max_len + self.args.query_max_len // 2,
            self.max_length - len(self.pair_tokenizer.ids_of(template).closing),
            template,
        )


class MatryoshkaTrainDataset(MatryoshkaDataset):
    """Groups of a query with `train_group_size` passages: one positive, first, and negatives.

    A draw is a function of (seed, epoch, item). So a resumed run draws the same, and so does any number of processes.

    Args:
        args, tokenizer, seed, template: as in `MatryoshkaDataset`.
        has_grades: draw several positives into a group, first, with their grades. At most half of a group are
            positives, more if the row has too few negatives.

    Attributes:
        others: column of other rows that random negatives are drawn from.

    Raises:
        ValueError: if a file has too few distinct texts for the random negatives of one of its rows.
    """

    others = "pos"

    def __init__(
        self,
        args: Any,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 42,
        template: Template | None = None,
        has_grades: bool = False,
    ) -> None:
        super().__init__(args, tokenizer, seed, template)
        self.has_grades = has_grades
        if args.random_negatives:
            for (start, size), path in zip(self.files, args.train_data, strict=True):
                self._refuse_few_texts(self.dataset.select(range(start, start + size)), path)
        self._texts_of_files: dict[int, dict[str, str]] = {}
        # Shared memory: workers of a data loader may live longer than an epoch.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @classmethod
    def min_negatives(cls, args: Any) -> int:
        """Return 0 if all negatives of a group are passages of other rows."""
        return int(_count_random_negatives(args) < args.train_group_size - 1)

    def _refuse_few_texts(self, rows: Dataset, path: str) -> None:
        """Raise ValueError if the file has too few texts for the random negatives of one of its rows."""
        wanted = _count_random_negatives(self.args)
        own_columns = [
            rows.data.column(name) for name, kind in COLUMNS[self.row_kind(self.args)].items() if kind == TEXTS
        ]
        most_own = 1 + sum(pc.max(pc.list_value_length(column)).as_py() or 0 for column in own_columns)
        texts: set[str] = set()
        for row in rows:
            texts.update(map(_fold_text, row[self.others]))
            if len(texts) >= wanted + most_own:  # enough for every row, whatever texts are its own
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
        return set(map(_fold_text, (row["query"], *self.passages_of(row))))

    def passages_of(self, row: dict[str, Any]) -> list[str]:
        """Return all passages of the row."""
        return [*row["pos"], *row["neg"]]

    def truncated_shares(self) -> tuple[float, float, int]:
        """Tokenise a sample of rows: evenly spaced rows, and the first passages of each.

        Returns:
            The shares of queries and of passages that are truncated, in [0, 1], and the number of rows.
        """
        items = range(0, len(self), math.ceil(len(self) / SAMPLED_ROWS))
        queries, passages = [], []
        for item in items:
            row = self.dataset[item]
            pairs = self._pairs(row, self.passages_of(row)[:SAMPLED_PASSAGES])
            queries.append(pairs[0].query_is_cut)
            passages += [pair.passage_is_cut for pair in pairs]
        return sum(queries) / len(queries), sum(passages) / len(passages), len(items)

    def start_epoch(self, epoch: int) -> None:
        """Draw positives and negatives of this epoch from now on.

        The name is not `set_epoch`, because accelerate calls `set_epoch` in runs of a single process only.
        """
        self.epoch.fill_(epoch)

    def __getitem__(self, item: int) -> Group:
        """Return a group, with teacher scores if `knowledge_distillation` is set."""
        row, args = self.dataset[item], self.args
        draw = random.Random(f"{self.seed}-{int(self.epoch)}-{item}")
        positives = [draw.randrange(len(row["pos"]))]
        others = self._passages_of_others(item, row, draw)
        if self.has_grades:
            own = args.train_group_size - len(others)
            most = max(args.train_group_size // 2, own - len(row["neg"]))
            most = min(most, max(own - 1, 1))  # a place stays for a negative of the row
            rest = [index for index in range(len(row["pos"])) if index != positives[0]]
            positives += draw.sample(rest, min(len(rest), most - 1))
        negatives = _draw_indices(len(row["neg"]), args.train_group_size - len(positives) - len(others), draw)
        passages = [
            *(self._shuffle_thirds(row["pos"][index], draw) for index in positives),
            *(row["neg"][index] for index in negatives),
            *others,
        ]
        scores = grades = None
        if args.knowledge_distillation:
            scores = [*(row["pos_scores"][index] for index in positives)]
            scores += [row["neg_scores"][index] for index in negatives]
            lowest = min([*row["pos_scores"], *row["neg_scores"]])
            scores += [lowest - RANDOM_MARGIN] * len(others)
        if self.has_grades:
            grades = [row["pos_labels"][index] for index in positives]
            grades += [0.0] * (len(negatives) + len(others))
        return Group(self._pairs(row, passages), scores, grades)

    def _passages_of_others(self, item: int, row: dict[str, Any], draw: random.Random) -> list[str]:
        """Draw the random negatives of a group from other rows of the same file.

        They differ from each other, from all passages of the row and from its query. The comparison ignores white space
        and case.
        """
        first, size = next((first, size) for first, size in self.files if item < first + size)
        taken = self._own_texts(row)
        others: list[str] = []
        while len(others) < _count_random_negatives(self.args):
            for _ in range(DRAWS):
                passage = draw.choice(self.dataset[first + draw.randrange(size)][self.others])
                if _fold_text(passage) not in taken:
                    break
            else:
                # The file repeats few texts. `_refuse_few_texts` has found that there are enough of them.
                texts = self._texts_of_file(first, size)
                passage = draw.choice([text for key, text in texts.items() if key not in taken])
            taken.add(_fold_text(passage))
            others.append(passage)
        return others

    def _texts_of_file(self, first: int, size: int) -> dict[str, str]:
        """Return the distinct texts of rows `first` to `first + size - 1` by their normalised form."""
        if first not in self._texts_of_files:
            rows = self.dataset.select(range(first, first + size))
            self._texts_of_files[first] = {_fold_text(text): text for row in rows for text in row[self.others]}
        return self._texts_of_files[first]

    def _shuffle_thirds(self, text: str, draw: random.Random) -> str:
        """Reorder the thirds of a share of the positives, FlagEmbedding's `shuffle_ratio`."""
        if len(text) <= 100 or draw.random() >= self.args.shuffle_ratio:
            return text
        size = len(text) // 3 + 1
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        return " ".join(draw.sample(pieces, len(pieces)))


class UnlabelledTrainDataset(MatryoshkaTrainDataset):
    """Groups of a query with `train_group_size` passages, in any order, without labels and scores."""

    others = "passages"

    @classmethod
    def row_kind(cls, args: Any) -> RowKind:
        """Return the kind of row that is needed."""
        return "passages"

    def passages_of(self, row: dict[str, Any]) -> list[str]:
        """Return all passages of the row."""
        return row["passages"]

    def __getitem__(self, item: int) -> Group:
        """Return a group without teacher scores and grades."""
        row, args = self.dataset[item], self.args
        draw = random.Random(f"{self.seed}-{int(self.epoch)}-{item}")
        own = self.passages_of(row)
        others = self._passages_of_others(item, row, draw)
        drawn = _draw_indices(len(own), args.train_group_size - len(others), draw)
        return Group(self._pairs(row, [*(own[index] for index in drawn), *others]))


def _count_random_negatives(args: Any) -> int:
    """Return the number of random negatives in a group."""
    return round(args.random_negatives * (args.train_group_size - 1))


def _fold_text(text: str) -> str:
    """Return the form in which texts are compared: case folded, each run of white space one space."""
    return " ".join(text.split()).casefold()


def _draw_indices(size: int, wanted: int, draw: random.Random) -> list[int]:
    """Draw `wanted` of `size` indices, each at most ⌈wanted ÷ size⌉ times: none twice if there are enough."""
    if not wanted:
        return []
    return draw.sample(list(range(size)) * math.ceil(wanted / size), wanted)


class MatryoshkaEvalDataset(MatryoshkaDataset):
    """Lists to rank: a query with all its positives and negatives."""

    def __getitem__(self, item: int) -> Group:
        """Return the pairs of the list, and their grades, 0 for negatives."""
        row = self.dataset[item]
        pairs = self._pairs(row, [*row["pos"], *row["neg"]])
        return Group(pairs, grades=row["pos_labels"] + [0.0] * len(row["neg"]))


@dataclass(frozen=True)
class PackedPairs:
    """Pairs as a packed row. accelerate and a data loader move it like a tensor.

    Attributes:
        token_ids: (1, total_tokens) int64.
        packed: the segments. Neighbouring pairs with the same query tokens share them.
    """

    token_ids: Tensor
    packed: PackedBatch

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedPairs:
        """Return the pairs with token ids on `device`. `packed` creates its index tensors there, too."""
        token_ids = self.token_ids.to(device, non_blocking=non_blocking)
        return PackedPairs(token_ids, self.packed.to(token_ids.device))

    def pin_memory(self) -> PackedPairs:
        """Return the pairs with token ids in pinned memory, so that a copy to a GPU does not block."""
        return PackedPairs(self.token_ids.pin_memory(), self.packed)


def pack_groups(groups: Sequence[Group]) -> PackedPairs:
    """Pack the pairs of all groups into one row, on the CPU."""
    return PackedPairs(*pack_pairs(list(chain.from_iterable(group.pairs for group in groups)), torch.device("cpu")))


class MatryoshkaCollator:
    """Packs groups for a training pass."""

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Return `pair`, a `PackedPairs`, and `teacher_scores` and `grades`, each (pairs,) float32 or None."""
        return {
            "pair": pack_groups(groups),
            "teacher_scores": _joined([group.scores for group in groups]),
            "grades": _joined([group.grades for group in groups]),
        }


def _joined(lists: Sequence[Sequence[float] | None]) -> Tensor | None:
    """Return the numbers of all groups in one tensor, None if the groups have none."""
    numbers = [numbers for numbers in lists if numbers is not None]
    return torch.tensor(list(chain.from_iterable(numbers))) if numbers else None


class MatryoshkaEvalCollator:
    """Packs lists for evaluation. They may differ in length."""

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Return `pair` as in training, and `labels`, (lists, longest list), with PADDING after the end of a list."""
        labels = [torch.tensor(group.grades) for group in groups]
        return {
            "pair": pack_groups(groups),
            "labels": pad_sequence(labels, batch_first=True, padding_value=PADDING),
        }
