"""From a query and a passage to the token ids of a sequence: the only place that joins and truncates them.

[bos] before query between passage behind prompt
|--------- lead ---------|        |prompt part |

[bos] before passage between query behind prompt         (a template with passage_first)
|-- lead --|        |-------- prompt part --------|
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.text.encoding import Ids, TextEncoder, whole_characters
from flagembedding_matryoshka.text.templates import Template, Words

TEMPLATES_REMEMBERED = 256
"""Different templates, and templates with different instructions, whose token ids are kept."""


class EncodedText(NamedTuple):
    """Ids of a text, (tokens,) int32, and whether the text is truncated."""

    ids: Ids
    is_cut: bool = False


@dataclass(frozen=True)
class Prefix:
    """Token ids at the beginning of sequences, which they may share. Prefixes are equal if their ids are.

    Attributes:
        ids: (tokens,) int32.
        key: the bytes of `ids`.
    """

    ids: Ids = field(compare=False)
    key: bytes = field(repr=False)


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """An input sequence in three parts. Compression merges tokens of the passage.

    Attributes:
        lead: tokens before the passage; pairs of one query from one call of `build` hold the same object.
        passage_ids, prompt_ids: tokens of the passage and tokens after it, (tokens,) int32.
        query_is_cut, passage_is_cut: whether the text is truncated.
        passage_first: whether the query is in the prompt part, so that sequences may share their passage.
        is_cut: whether query or passage is truncated.
        prefix: tokens that sequences of a batch may share: the lead, and with `passage_first` the passage.
        query_length, passage_length, prompt_length: number of tokens before the passage, in it and after it.
        length: number of all tokens.
        own_length: number of tokens after the prefix.
    """

    lead: Prefix
    passage_ids: Ids
    prompt_ids: Ids
    query_is_cut: bool = False
    passage_is_cut: bool = False
    passage_first: bool = False
    is_cut: bool = field(init=False)
    prefix: Prefix = field(init=False)
    query_length: int = field(init=False)
    passage_length: int = field(init=False)
    prompt_length: int = field(init=False)
    length: int = field(init=False)
    own_length: int = field(init=False)

    def __post_init__(self) -> None:
        lead, passage, prompt = self.lead.ids, self.passage_ids, self.prompt_ids
        prefix = self.lead
        if self.passage_first:
            ids = np.concatenate([lead, passage])
            prefix = Prefix(ids, ids.tobytes())
        length = len(lead) + len(passage) + len(prompt)
        values = {
            "is_cut": self.passage_is_cut or self.query_is_cut,
            "prefix": prefix,
            "query_length": len(lead),
            "passage_length": len(passage),
            "prompt_length": len(prompt),
            "length": length,
            "own_length": length - len(prefix.ids),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def input_ids(self) -> Ids:
        """The whole sequence, (tokens,) int32."""
        return np.concatenate([self.lead.ids, self.passage_ids, self.prompt_ids])

    def __len__(self) -> int:
        return self.length

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenizedPair):
            return NotImplemented
        return (
            (self.lead, self.query_is_cut, self.passage_is_cut)
            == (other.lead, other.query_is_cut, other.passage_is_cut)
            and np.array_equal(self.passage_ids, other.passage_ids)
            and np.array_equal(self.prompt_ids, other.prompt_ids)
        )


def count_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Return the number of tokens of a batch, in which neighbours share their prefix."""
    before = [None, *(pair.prefix for pair in pairs)]
    return sum(pair.own_length if pair.prefix == one else pair.length for pair, one in zip(pairs, before, strict=False))


def count_input_tokens(pairs: Sequence[TokenizedPair]) -> tuple[int, list[int]]:
    """Count the tokens of one query's pairs.

    Returns:
        the number of tokens before the passages, which a batch holds once, and the number of each pair's other tokens.
    """
    shared = pairs[0].query_length if pairs else 0
    return shared, [pair.length - pair.query_length for pair in pairs]


def find_head_token_id(tokenizer: PreTrainedTokenizerBase, text: str = "Yes") -> int:
    """Return the first token of `text`: the row of the vocabulary that scoring heads are initialised with."""
    return tokenizer(text, add_special_tokens=False)["input_ids"][0]


def find_head_token_ids(tokenizer: PreTrainedTokenizerBase, head_tokens: Sequence[str | int]) -> list[int]:
    """Return the token ids of a template's `head_tokens`: the first token of a word, or a number itself.

    Raises:
        ValueError: if two are the same token, so that all scores would be equal, or an id is not in the vocabulary.
    """
    found = [token if isinstance(token, int) else find_head_token_id(tokenizer, token) for token in head_tokens]
    if len(set(found)) < len(found):
        raise ValueError(f"the head_tokens {list(head_tokens)} begin with the same token, {found[0]}.")
    if beyond := [token for token in found if token >= len(tokenizer)]:
        raise ValueError(f"the head_tokens {beyond} are not in the tokenizer's vocabulary of {len(tokenizer)} tokens.")
    return found


class TextWords(NamedTuple):
    """The words of a template's format, with its instruction, around a text.

    Attributes:
        before, after: the words before and after the text.
        strips: whether white space around the text is removed.
        continues: whether they follow other words in the sequence, see `TextEncoder`.
        ids: token ids of all of the words, (tokens,) int32.
        end: token ids of `after`, which truncation keeps, (tokens,) int32.
    """

    before: str
    after: str
    strips: bool
    continues: bool
    ids: Ids
    end: Ids


class TemplateIds(NamedTuple):
    """Token ids of a template's words, (tokens,) int32 each.

    Attributes:
        opening: the begin-of-sequence token, if the template's rule has one, and the words before the first text.
        between: words between the texts.
        closing: words after the second text, and the prompt. Sequences of one template hold the same array.
        query, passage: words of the formats.
    """

    opening: Ids
    between: Ids
    closing: Ids
    query: TextWords
    passage: TextWords


class PairTokenizer:
    """Build input sequences of queries and passages.

    Args:
        tokenizer: used without special tokens; the template places its begin-of-sequence token.
        template: the words around queries and passages; a call may give another one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template | None = None) -> None:
        self.template = Template() if template is None else template
        self.tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)
        self._known: dict[Template, TemplateIds] = {}

    @cached_property
    def _within(self) -> TextEncoder:
        """Encoder of texts that follow other words."""
        return TextEncoder(self.tokenizer, continues=True)

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer puts a begin-of-sequence token before a text."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][0] == bos

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special)

    def opening(self, template: Template) -> Ids:
        """Return the begin-of-sequence token before the template's words, (0 or 1,) int32, see `Template.bos`."""
        bos, token = self.tokenizer.bos_token_id, self.tokenizer.bos_token
        before = template.before if isinstance(template.before, str) else template.before[0]
        rule = template.bos
        if rule == "reference" and before.startswith(self._control_tokens):
            rule = "tokenizer"
        if rule == "reference":
            has_bos = bos is not None and bos != self.tokenizer.pad_token_id
        else:
            has_bos = rule == "tokenizer" and self._adds_bos and not before.startswith(token)
        return _as_ids([bos] if has_bos else [])

    def encode(self, texts: Sequence[str], max_length: int, words: TextWords) -> dict[str, EncodedText]:
        """Encode each different text once, with words around it.

        Args:
            max_length: most tokens of a text, its words included.
        """
        different = list(dict.fromkeys(texts))
        worded = [f"{words.before}{text.strip() if words.strips else text}{words.after}" for text in different]
        encoder = self._within if words.continues else self._encoder
        kept = max(0, max_length - len(words.end))
        return {
            text: EncodedText(ids)
            if len(ids) <= max_length
            else EncodedText(np.concatenate([ids[:kept], words.end]), True)
            for text, ids in zip(different, encoder.beginnings(worded, max_length + 1), strict=True)
        }

    def fixed(self, words: Words) -> Ids:
        """Encode a template's words, (tokens,) int32. Control tokens are control tokens; in a tuple only in its first,
        third, … text."""
        if not isinstance(words, str):
            parts = [self.plain(part) if place % 2 else self.fixed(part) for place, part in enumerate(words)]
            return np.concatenate(parts)
        text = whole_characters(words)
        return _as_ids(self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else [])

    def plain(self, text: str) -> Ids:
        """Encode words in which control tokens are text, (tokens,) int32."""
        return self._encoder.whole([text])[0] if text else _as_ids([])

    def ids_of(self, template: Template) -> TemplateIds:
        """Return the token ids of a template's words. Those of the last `TEMPLATES_REMEMBERED` templates are stored."""
        found = self._known.get(template)
        if found is None:
            of_texts = []
            for name, words, end in (
                ("query", template.query(""), template.query_end),
                ("passage", template.passage(""), template.passage_end),
            ):
                before = words[: len(words) - len(end)]
                ids = self.plain(words), self.plain(end)
                of_texts.append(TextWords(before, end, name in template.strip, template.is_continuous, *ids))
            found = TemplateIds(
                np.concatenate([self.opening(template), self.fixed(template.before)]),
                self.fixed(template.between),
                np.concatenate([self.fixed(template.behind), self.fixed(template.prompt)]),
                *of_texts,
            )
            self._known[template] = found
            for oldest in list(self._known)[:-TEMPLATES_REMEMBERED]:
                self._known.pop(oldest, None)
        return found

    def passage_offsets(self, passage: str, template: Template) -> NDArray[np.int64]:
        """Return first and last character in `passage` of each token of `template.passage(passage)`, (tokens, 2) int64.

        Raises:
            ValueError: if the tokenizer has no offsets.
        """
        words = self.ids_of(template).passage
        lead = len(words.before)
        if words.strips:
            lead -= len(passage) - len(passage.lstrip())
        encoder = self._within if words.continues else self._encoder
        offsets = encoder.offsets(template.passage(passage)) - lead
        return np.maximum.accumulate(offsets.clip(0, len(passage)), axis=0)

    def build(
        self,
        pairs: Sequence[tuple[str, str]],
        query_max_length: int,
        passage_max_length: int,
        max_length: int,
        template: Template | None = None,
    ) -> list[TokenizedPair]:
        """Build an input sequence of each pair. Each different text is tokenised once.

        Args:
            query_max_length, passage_max_length: most tokens of query and passage, with their instructions.
            max_length: most tokens of the sequence without `behind` and `prompt`. The passage is truncated
                before its end to fit.
            template: the words around the texts; None is the default template.

        Raises:
            ValueError: if a query leaves no room for its passage.
        """
        template = self.template if template is None else template
        words = self.ids_of(template)
        of_query = self.encode([query for query, _ in pairs], query_max_length, words.query)
        of_passage = self.encode([passage for _, passage in pairs], passage_max_length, words.passage)
        around: dict[str, tuple[Prefix, Ids]] = {}  # the lead and the prompt part of each query
        for text, query in of_query.items():
            lead_ids, prompt_ids = words.opening, words.closing
            if template.passage_first:
                prompt_ids = np.concatenate([words.between, query.ids, words.closing])
            else:
                lead_ids = np.concatenate([words.opening, query.ids, words.between])
            around[text] = Prefix(lead_ids, lead_ids.tobytes()), prompt_ids
        end, beside = words.passage.end, len(words.opening) + len(words.between)
        found = []
        for text, passage in pairs:
            (lead, prompt_ids), query, (ids, is_cut) = around[text], of_query[text], of_passage[passage]
            room = max_length - beside - len(query.ids)
            if room < max(len(end), min(1, len(ids))):
                raise ValueError(
                    f"a query of {len(query.ids)} tokens leaves no room for its passage: with {beside} other tokens "
                    f"it must fit into {max_length}. Lower query_max_length, or raise max_length."
                )
            if len(ids) > room:
                ids, is_cut = np.concatenate([ids[: room - len(end)], end]), True
            found.append(TokenizedPair(lead, ids, prompt_ids, query.is_cut, is_cut, template.passage_first))
        return found

    def lengths_within(
        self, query_max_length: int | None, max_length: int, template: Template, fits_all_queries: bool = False
    ) -> tuple[int, int, int]:
        """Return the lengths of FlagEmbedding's re-rankers for `build`: most tokens of query, passage and sequence.

        Args:
            query_max_length: most tokens of a query; None is three quarters of `max_length`.
            max_length: most tokens of query and passage together, without the template's words. If the template has
                `has_reference_lengths`: most tokens of a passage, and with the number of tokens of the prompt part
                added, most tokens before the prompt part.
            template: the words around the texts.
            fits_all_queries: passages get the length that fits beside the longest query, so that their tokens do not
                depend on their query.

        Raises:
            ValueError: if `max_length` leaves no room for a query, or no passage fits beside the longest query.
        """
        words = self.ids_of(template)
        query_max_length = query_max_length or max_length * 3 // 4
        if not query_max_length:
            raise ValueError(
                f"max_length={max_length} leaves no token of a query, which gets three quarters: give at least 2."
            )
        beside = len(words.opening) + len(words.between)
        query, passage, whole = query_max_length, max_length, max_length + len(words.closing)
        if not template.has_reference_lengths:
            query, passage = query + len(words.query.ids), passage + len(words.passage.ids)
            whole = max_length + len(words.query.ids) + len(words.passage.ids) + beside
        if fits_all_queries:
            room = whole - beside - query
            if room < max(len(words.passage.end), 1):
                raise ValueError(
                    f"query_max_length={query_max_length} leaves no room for passages that fit beside every query: "
                    f"lower it, or raise max_length={max_length}."
                )
            passage = min(passage, room)
        return query, passage, whole

    def passages(self, texts: Sequence[str], max_length: int, template: Template | None = None) -> list[EncodedText]:
        """Encode passages with the template's words around them, as in `build`, in at most `max_length` tokens each."""
        template = self.template if template is None else template
        encoded = self.encode(texts, max_length, self.ids_of(template).passage)
        return [encoded[text] for text in texts]

    def build_texts(
        self, pairs: Sequence[tuple[str, str]], query_max_length: int, passage_max_length: int, template: Template
    ) -> list[TokenizedPair]:
        """Build sequences with lengths that do not count the template's words.

        Args:
            query_max_length, passage_max_length: most tokens of query and passage, without their instructions.
        """
        words = self.ids_of(template)
        query, passage = query_max_length + len(words.query.ids), passage_max_length + len(words.passage.ids)
        whole = query + passage + len(words.opening) + len(words.between)
        return self.build(pairs, query, passage, whole, template)


def _as_ids(values: Sequence[int]) -> Ids:
    return np.array(values, dtype=np.int32)
