"""From texts to token ids. Of a long text that is truncated, only a part near the cut is tokenised."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from itertools import islice
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

Ids: TypeAlias = NDArray[np.int32]

WORD_END = re.compile(r"(?<=\S)\s")
SURROGATES = re.compile("[\ud800-\udfff]")
CHARACTERS_AT_ONCE = 1_000_000
"""Most characters in one call of the tokenizer, whose results take a hundred times the memory of the ids."""
MARGIN = 128
"""Tokens before a cut that the cut may have changed: more than WordPiece makes of a word."""
CHARACTERS = 8
"""Characters of a token, as a first guess. If tokens are longer, more of the text is tokenised."""
MARK = "\ue000"
"""A character of the private use area, which no vocabulary merges with the next character."""
NEIGHBOURS = 32
"""More characters than a piece has: SentencePiece allows 16."""


def whole_characters(text: str) -> str:
    """Join surrogate pairs and replace halves of them by U+FFFD. JSON can hold halves, tokenizers refuse them."""
    if text.isascii() or not SURROGATES.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TextEncoder:
    """Encode texts of users. Control tokens in them are encoded as text.

    Args:
        tokenizer: used without special tokens; it is not changed.
        continues: whether texts follow other words in the sequence. SentencePiece's tokenizers put a space before every
            text; with True the tokens of this space are removed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, continues: bool = False) -> None:
        # A copy, because this setting is state of the tokenizer, which other threads share.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.split_special_tokens = True
        self._mark = ""
        self._mark_tokens = 0
        if continues:
            alone, mark, within = self.whole(["a b", MARK, f"{MARK}a b"])
            if not np.array_equal(within[len(mark) :], alone):
                self._mark, self._mark_tokens = MARK, len(mark)

    def whole(self, texts: Sequence[str]) -> list[Ids]:
        """Encode each text as (tokens,) int32."""
        found: list[Ids] = []
        start = 0
        while start < len(texts):
            end, characters = start + 1, len(texts[start])
            while end < len(texts) and (characters := characters + len(texts[end])) <= CHARACTERS_AT_ONCE:
                end += 1
            # verbose=False: its warning of long input does not matter here.
            encoded = self._tokenizer(
                [self._mark + whole_characters(text) for text in texts[start:end]],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            found += [np.array(ids[self._mark_tokens :], dtype=np.int32) for ids in encoded["input_ids"]]
            start = end
        return found

    def offsets(self, text: str) -> NDArray[np.int64]:
        """Return first and last character of each token of `whole`, (tokens, 2) int64; the last is exclusive.

        Raises:
            ValueError: if the tokenizer has no offsets.
        """
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {type(self._tokenizer).__name__} is not a fast tokenizer and has no offsets."
            )
        marked = self._mark + text
        encoded = self._tokenizer(marked, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        found = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return found[self._mark_tokens :] - len(self._mark)

    def beginnings(self, texts: Sequence[str], tokens: int) -> list[Ids]:
        """Return the first `tokens` of `whole` for each text.

        Of a long text, several beginnings are tokenised, which end at the characters of `_ends`. Tokens near an end may
        differ from those of the whole text, for example within a word or a run of spaces. Beginnings count if all of
        them have MARGIN tokens more than `tokens`, and agree in the first `tokens`. Otherwise longer beginnings are
        tokenised, up to the whole text.
        """
        found: dict[int, Ids] = {}
        size = (tokens + MARGIN) * CHARACTERS
        while missing := [index for index in range(len(texts)) if index not in found]:
            # The beginnings have more than `size` characters together.
            ends = {index: _ends(texts[index], size) for index in missing if len(texts[index]) > 2 * size}
            # Only of texts twice as long: all attempts, which grow by 4, then tokenise less than the whole text.
            cut = [index for index, own in ends.items() if len(texts[index]) > 2 * sum(own)]
            whole = [index for index in missing if index not in cut]
            found |= zip(whole, self.whole([texts[index] for index in whole]), strict=True)
            rest = iter(self.whole([texts[index][:end] for index in cut for end in ends[index]]))
            for index in cut:
                first, *others = islice(rest, len(ends[index]))
                agree = all(np.array_equal(first[:tokens], other[:tokens]) for other in others)
                if agree and all(len(ids) >= tokens + MARGIN for ids in (first, *others)):
                    found[index] = first
            size *= 4
        # Copies, because a view would keep all ids in memory.
        return [found[index][:tokens].copy() for index in range(len(texts))]

    def cut(self, text: str, tokens: int, keep_end: bool = False) -> str:
        """Truncate `text` to its first `tokens` tokens, or with `keep_end` to its last ones.

        Of a long text only a part is tokenised, as in `beginnings`.

        Raises:
            ValueError: if the tokenizer has no offsets.
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
        """Return characters up to the end of each token, or from its start to the text's end, last token first."""
        offsets = self.offsets(text)
        return len(text) - offsets[::-1, 0] if from_end else offsets[:, 1]


def _starts(text: str, size: int) -> list[int]:
    """Return characters at which to begin the last `size` characters, by the rule of `_ends`."""
    found = [WORD_END.search(text, max(0, len(text) - end)) for end in (size, 2 * size)]
    word_ends = [len(text) if place is None else place.start() for place in found]
    if word_ends[1] < word_ends[0] <= len(text) - size // 2:
        return word_ends
    return [max(0, len(text) - end) for end in range(size, size + NEIGHBOURS)]


def _ends(text: str, size: int) -> list[int]:
    """Return characters at which to end the first `size` characters of a text: after words, if there are spaces.

    Without spaces the tokens, above all Unigram's, may depend on the characters that follow. One token of the whole
    text ends at one of NEIGHBOURS neighbouring characters. Up to there the tokens do not depend on what follows.
    """
    word_ends = [len(text[:end].rpartition(" ")[0].rstrip()) for end in (size, 2 * size)]
    if size // 2 <= word_ends[0] < word_ends[1]:
        return word_ends
    return list(range(size - NEIGHBOURS + 1, size + 1))
