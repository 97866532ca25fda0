"""From a query and a passage to token ids and part lengths; the only place that joins and truncates.

[bos] before query between passage behind prompt
|----- query part --------|        |prompt part|
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.text.encoding import Ids, TextEncoder, whole_characters
from flagembedding_matryoshka.text.templates import Template


class Encoded(NamedTuple):
    """(tokens,) int32 ids of a text, and whether they are of its beginning alone."""

    ids: Ids
    is_cut: bool = False


@dataclass(frozen=True)
class QueryPart:
    """What the candidates of a query have in common. Equal ids are equal parts, whichever call made them.

    Attributes:
        ids: (tokens,) int32.
        is_cut: whether the query is longer than what is left of it.
    """

    ids: Ids = field(compare=False)
    is_cut: bool = field(default=False, compare=False)
    _key: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_key", self.ids.tobytes())

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """One input sequence in its three parts, of which compression may merge the passage.

    Attributes:
        query: of all pairs of a query that were built together the same object.
        passage_ids, prompt_ids: (tokens,) int32.
        passage_is_cut: whether the passage is longer than what is left of it.
    """

    query: QueryPart
    passage_ids: Ids
    prompt_ids: Ids
    passage_is_cut: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether query or passage is longer than what is left of it."""
        return self.passage_is_cut or self.query.is_cut

    @property
    def input_ids(self) -> Ids:
        """(tokens,) int32: the whole sequence."""
        return np.concatenate([self.query.ids, self.passage_ids, self.prompt_ids])

    @property
    def query_length(self) -> int:
        return len(self.query)

    @property
    def passage_length(self) -> int:
        return len(self.passage_ids)

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_ids)

    @property
    def own_length(self) -> int:
        """Tokens behind the query part."""
        return len(self.passage_ids) + len(self.prompt_ids)

    def __len__(self) -> int:
        return len(self.query) + self.own_length

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenizedPair):
            return NotImplemented
        return (
            (self.query, self.is_cut) == (other.query, other.is_cut)
            and np.array_equal(self.passage_ids, other.passage_ids)
            and np.array_equal(self.prompt_ids, other.prompt_ids)
        )


def find_head_token_id(tokenizer: PreTrainedTokenizerBase, text: str = "Yes") -> int:
    """The first token of `text`: the vocabulary row that scoring heads start from."""
    return tokenizer(text, add_special_tokens=False)["input_ids"][0]


def find_head_token_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """The first token of each of a template's `head_tokens`.

    Raises:
        ValueError: if two words begin with the same token: a head made of them would score everything alike.
    """
    found = [find_head_token_id(tokenizer, word) for word in words]
    if len(set(found)) < len(found):
        raise ValueError(f"the head_tokens {list(words)} begin with the same token, {found[0]}.")
    return found


class PairTokenizer:
    """Joins tokenised queries and passages into input sequences.

    Args:
        tokenizer: used without special tokens; its bos opens a sequence unless it is also the pad token.
        template: what stands around queries and passages, unless a call says otherwise.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template | None = None) -> None:
        self.template = Template() if template is None else template
        self.tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)
        has_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.pad_token_id
        self.bos_ids = _as_ids([tokenizer.bos_token_id] if has_bos else [])
        self._fixed: dict[str, Ids] = {}
        self._prompts: dict[tuple[str, str], Ids] = {}

    def encode(self, texts: Sequence[str], max_length: int, end: str = "") -> dict[str, Encoded]:
        """Token ids of each text; one that occurs several times is tokenised once.

        Args:
            max_length: tokens that a text is cut to, its end excepted.
            end: what all texts end with.
        """
        different = list(dict.fromkeys(texts))
        kept = max(0, max_length - len(self.fixed(end)))
        found = self._encoder.beginnings(different, max_length + 1)
        return {
            text: Encoded(ids)
            if len(ids) <= max_length
            else Encoded(np.concatenate([ids[:kept], self.fixed(end)]), True)
            for text, ids in zip(different, found, strict=True)
        }

    def fixed(self, text: str) -> Ids:
        """(tokens,) int32 ids of a template's text, in which control tokens are control tokens."""
        if text not in self._fixed:
            found = self.tokenizer(whole_characters(text), add_special_tokens=False)["input_ids"] if text else []
            self._fixed[text] = _as_ids(found)
        return self._fixed[text]

    def prompt_ids(self, template: Template) -> Ids:
        """(tokens,) int32: the prompt part, of which all pairs hold the same array."""
        words = (template.behind, template.prompt)
        if words not in self._prompts:
            self._prompts[words] = np.concatenate(list(map(self.fixed, words)))
        return self._prompts[words]

    def passage_offsets(self, passage: str, template: Template) -> NDArray[np.int64]:
        """(tokens, 2) int64: where in `passage` the tokens of `template.passage(passage)` begin and end.

        Raises:
            ValueError: if the tokenizer does not know.
        """
        lead = len(template.passage("")) - len(template.passage_end)
        offsets = self._encoder.offsets(template.passage(passage)) - lead
        return np.maximum.accumulate(offsets.clip(0, len(passage)), axis=0)

    def build(
        self,
        pairs: Sequence[tuple[str, str]],
        query_max_length: int,
        passage_max_length: int,
        max_length: int,
        template: Template | None = None,
    ) -> list[TokenizedPair]:
        """Input sequences of query and passage; a text that several have is tokenised once.

        Args:
            query_max_length, passage_max_length: tokens that query and passage, with their instructions, are cut to.
            max_length: tokens before the prompt part; the passage is cut to what the query leaves of them.
            template: None is the tokenizer's own.

        Raises:
            ValueError: if a query leaves no room for its passage.
        """
        template = self.template if template is None else template
        queries = [template.query(query) for query, _ in pairs]
        passages = [template.passage(passage) for _, passage in pairs]
        encoded_queries = self.encode(queries, query_max_length, template.query_end)
        encoded = self.encode(passages, passage_max_length, template.passage_end)
        parts = {text: self.query_part(query, template) for text, query in encoded_queries.items()}
        return [
            self.join(parts[query], encoded[passage], max_length, template)
            for query, passage in zip(queries, passages, strict=True)
        ]

    def build_within(
        self, pairs: Sequence[tuple[str, str]], query_max_length: int | None, max_length: int, template: Template
    ) -> list[TokenizedPair]:
        """`build` with the lengths of FlagEmbedding's re-rankers.

        Args:
            query_max_length: tokens of a query; None is three quarters of `max_length`.
            max_length: tokens of a passage, and of all that stands before the prompt part but for `before` and as many
                tokens as the prompt part has.

        Raises:
            ValueError: if a query leaves no room for its passage, or `max_length` none for a query.
        """
        beside = len(self.fixed(template.before)) + len(self.prompt_ids(template))
        query_max_length = query_max_length or max_length * 3 // 4
        if not query_max_length:
            raise ValueError(f"max_length={max_length} leaves no token of a query, which gets three quarters of it.")
        return self.build(pairs, query_max_length, max_length, max_length + beside, template)

    def query_part(self, query: Encoded, template: Template) -> QueryPart:
        """All that stands in front of the passage."""
        before, between = self._beside(template)
        return QueryPart(np.concatenate([before, query.ids, between]), query.is_cut)

    def join(self, query: QueryPart, passage: Encoded, max_length: int, template: Template) -> TokenizedPair:
        """Build the sequence; the passage is cut so that all before the prompt part holds `max_length` tokens.

        Raises:
            ValueError: if the query leaves no room for its passage.
        """
        ids, is_cut = passage
        room = max_length - len(query)
        end_ids = self.fixed(template.passage_end)
        if room < max(len(end_ids), min(1, len(ids))):
            beside = sum(map(len, self._beside(template)))
            raise ValueError(
                f"a query of {len(query) - beside} tokens leaves no room for its passage: with {beside} tokens beside "
                f"it, it must fit into {max_length}. Cut queries shorter or raise the maximal length."
            )
        if len(ids) > room:
            ids, is_cut = np.concatenate([ids[: room - len(end_ids)], end_ids]), True
        return TokenizedPair(query, ids, self.prompt_ids(template), is_cut)

    def _beside(self, template: Template) -> tuple[Ids, Ids]:
        """What stands before and behind the query in its part."""
        return np.concatenate([self.bos_ids, self.fixed(template.before)]), self.fixed(template.between)


def _as_ids(values: Sequence[int]) -> Ids:
    return np.array(values, dtype=np.int32)
