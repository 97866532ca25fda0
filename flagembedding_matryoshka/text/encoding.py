"""From texts to token ids; of a text that is longer than what is wanted of it, no more is tokenised than that takes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

Ids: TypeAlias = NDArray[np.int32]

BEHIND_WORD = re.compile(r"(?<=\S)\s")
SURROGATES = re.compile("[\ud800-\udfff]")
CHARACTERS_AT_ONCE = 1_000_000
"""Tokenised in one call: a tokenizer's own results take a hundred times the memory of the ids."""
MARGIN = 128
"""Tokens in front of a cut that it may have changed: more than WordPiece makes of a word."""
CHARACTERS = 8
"""Of a token, as a first guess; a text of shorter ones is cut later than need be, one of longer ones tried again."""
MARK = "\ue000"
"""Of the private use area: no vocabulary merges it with what follows."""
NEIGHBOURS = 32
"""Characters of a piece, at most: SentencePiece's have 16."""


def whole_characters(text: str) -> str:
    """`text` with its surrogate pairs joined and halves of them replaced by U+FFFD: JSON can spell what no tokenizer
    reads."""
    if text.isascii() or not SURROGATES.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TextEncoder:
    """Token ids of the texts of users; control tokens that they spell are text.

    Args:
        tokenizer: used without special tokens, and left as it is.
        continues: whether texts continue other words. SentencePiece's tokenizers put a blank before every text that
            they get, also before one that continues a line; here it is left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, continues: bool = False) -> None:
        # A copy: which texts may hold control tokens is a tokenizer's state, which threads would share.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.split_special_tokens = True
        self._mark = ""
        self._mark_tokens = 0
        if continues:
            alone, mark, within = self.whole(["a b", MARK, f"{MARK}a b"])
            if not np.array_equal(within[len(mark) :], alone):
                self._mark, self._mark_tokens = MARK, len(mark)

    def whole(self, texts: Sequence[str]) -> list[Ids]:
        """(tokens,) int32 ids of each text."""
        found: list[Ids] = []
        for portion in _portions(texts):
            # The tokenizer's own truncation is state, too, and its warning of long input is moot here.
            encoded = self._tokenizer(
                [self._mark + whole_characters(text) for text in portion],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            found += [np.array(ids[self._mark_tokens :], dtype=np.int32) for ids in encoded["input_ids"]]
        return found

    def offsets(self, text: str) -> NDArray[np.int64]:
        """(tokens, 2) int64: the characters of `text` where each token of `whole` begins and ends.

        Raises:
            ValueError: if the tokenizer does not know.
        """
        if not self._tokenizer.is_fast:
            raise ValueError(f"the tokenizer {type(self._tokenizer).__name__} does not say where its tokens stand.")
        marked = self._mark + text
        encoded = self._tokenizer(marked, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        found = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return found[self._mark_tokens :] - len(self._mark)

    def beginnings(self, texts: Sequence[str], tokens: int) -> list[Ids]:
        """The first `tokens` of `whole`, or all where there are fewer.

        Of a long text beginnings are tokenised that end at several places, see `_ends`. What is near its end may be
        another token in the whole text (half of a word, spaces that are a run): each must have MARGIN tokens more than
        are wanted, and all the same ones; else longer beginnings are taken, up to the whole text.
        """
        found: dict[int, Ids] = {}
        size = (tokens + MARGIN) * CHARACTERS
        while missing := [index for index in range(len(texts)) if index not in found]:
            ends = {index: _ends(texts[index], size) for index in missing}
            # So that all that is tried, which grows by 4, never is more than the whole.
            cut = [index for index in missing if len(texts[index]) > 2 * sum(ends[index])]
            whole = [index for index in missing if index not in cut]
            found |= zip(whole, self.whole([texts[index] for index in whole]), strict=True)
            rest = iter(self.whole([texts[index][:end] for index in cut for end in ends[index]]))
            for index in cut:
                first, *others = islice(rest, len(ends[index]))
                agree = all(np.array_equal(first[:tokens], other[:tokens]) for other in others)
                if agree and all(len(ids) >= tokens + MARGIN for ids in (first, *others)):
                    found[index] = first
            size *= 4
        # Copies: a view would hold on to all that was tokenised.
        return [found[index][:tokens].copy() for index in range(len(texts))]

    def cut(self, text: str, tokens: int, keep_end: bool = False) -> str:
        """`text` up to the end of its first `tokens` tokens, or from the start of its last ones; as it is, where it has
        no more. Of a long text no more is tokenised than that takes, as in `beginnings`.

        Raises:
            ValueError: if the tokenizer does not say where its tokens stand.
        """
        whole, size = whole_characters(text), (max(0, tokens) + MARGIN) * CHARACTERS
        while True:
            parts = [whole[start:] for start in _starts(whole, size)] if keep_end else []
            parts = parts or [whole[:end] for end in _ends(whole, size)]
            if len(whole) <= 2 * sum(map(len, parts)):
                parts = [whole]
            first, *others = (self._lengths(part, keep_end) for part in parts)
            if not others:
                break
            agree = all(np.array_equal(first[:tokens], other[:tokens]) for other in others)
            if agree and all(len(lengths) >= tokens + MARGIN for lengths in (first, *others)):
                break
            size *= 4
        if len(first) <= tokens:
            return text
        length = int(first[tokens - 1]) if tokens > 0 else 0
        return whole[len(whole) - length :] if keep_end else whole[:length]

    def _lengths(self, text: str, from_end: bool) -> NDArray[np.int64]:
        """(tokens,) int64: characters up to the end of each token, or from the start of each, the last one first."""
        offsets = self.offsets(text)
        return len(text) - offsets[::-1, 0] if from_end else offsets[:, 1]


def _starts(text: str, size: int) -> list[int]:
    """Where to cut what is in front of the last `size` characters off, by the same reasons as `_ends`."""
    found = [BEHIND_WORD.search(text, max(0, len(text) - end)) for end in (size, 2 * size)]
    behind_words = [len(text) if place is None else place.start() for place in found]
    if behind_words[1] < behind_words[0] <= len(text) - size // 2:
        return behind_words
    return [max(0, len(text) - end) for end in range(size, size + NEIGHBOURS)]


def _ends(text: str, size: int) -> list[int]:
    """Where to cut a text: behind words, since tokenizers begin anew with the next.

    In about `size` characters without a space the best pieces (Unigram's above all) may depend on how many follow. One
    of the whole text's ends at one of NEIGHBOURS neighbouring characters, and in front of that it is what they are
    without all that follows.
    """
    behind_words = [len(text[:end].rpartition(" ")[0].rstrip()) for end in (size, 2 * size)]
    if size // 2 <= behind_words[0] < behind_words[1]:
        return behind_words
    return list(range(size - NEIGHBOURS + 1, size + 1))


def _portions(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Neighbours, so many that they have CHARACTERS_AT_ONCE together, or few more."""
    start = 0
    ends = list(accumulate(map(len, texts)))
    while start < len(texts):
        used = ends[start - 1] if start else 0
        end = start + 1
        while end < len(texts) and ends[end] - used <= CHARACTERS_AT_ONCE:
            end += 1
        yield texts[start:end]
        start = end
