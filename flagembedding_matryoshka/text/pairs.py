"""From a query and a passage to token ids and part lengths; the only place that joins and truncates.

[bos] before query between passage behind prompt
|----- query part --------|        |prompt part|
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.text.templates import Template

SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class TokenizedPair:
    """One input sequence; tokens between query part and prompt part are the passage, which compression may merge."""

    input_ids: list[int]
    query_length: int
    prompt_length: int

    @property
    def passage_length(self) -> int:
        return len(self.input_ids) - self.query_length - self.prompt_length

    @property
    def query_ids(self) -> list[int]:
        """The query part, which candidates of one query have in common."""
        return self.input_ids[: self.query_length]


def find_head_token_id(tokenizer: PreTrainedTokenizerBase, text: str = "Yes") -> int:
    """The first token of `text`: the vocabulary row that scoring heads start from."""
    return tokenizer(text, add_special_tokens=False)["input_ids"][0]


def whole_characters(text: str) -> str:
    """`text` with its surrogate pairs joined and halves of them replaced by U+FFFD: JSON can spell what no tokenizer
    reads."""
    if text.isascii() or not SURROGATES.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
        # A copy: which texts may hold control tokens is a tokenizer's state, which threads would share.
        self._of_users = copy.deepcopy(tokenizer)
        self._of_users.split_special_tokens = True
        has_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.pad_token_id
        self.bos_ids = [tokenizer.bos_token_id] if has_bos else []
        self._fixed: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str], max_length: int | None = None, end: str = "") -> list[list[int]]:
        """Token ids of each text; control tokens that it spells are text.

        Args:
            max_length: tokens that a text is cut to, its end excepted.
            end: what all texts end with.
        """
        if not texts:
            return []
        # The tokenizer's own truncation is state, too, and its warning of long input is moot here.
        texts = [whole_characters(text) for text in texts]
        encoded = self._of_users(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        if max_length is None:
            return encoded["input_ids"]
        end_ids = self.fixed(end)
        return [
            ids if len(ids) <= max_length else ids[: max(0, max_length - len(end_ids))] + end_ids
            for ids in encoded["input_ids"]
        ]

    def fixed(self, text: str) -> list[int]:
        """Token ids of a template's text, in which control tokens are control tokens."""
        if text not in self._fixed:
            self._fixed[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return self._fixed[text]

    def prompt_length(self, template: Template) -> int:
        """Tokens of the prompt part."""
        return len(self.fixed(template.behind)) + len(self.fixed(template.prompt))

    def build(
        self,
        pairs: Sequence[tuple[str, str]],
        query_max_length: int,
        passage_max_length: int,
        max_length: int,
        template: Template | None = None,
    ) -> list[TokenizedPair]:
        """Input sequences of query and passage; a query that several share is tokenised once.

        Args:
            query_max_length, passage_max_length: tokens that query and passage, with their instructions, are cut to.
            max_length: tokens before the prompt part; the passage is cut to what the query leaves of them.
            template: None is the tokenizer's own.

        Raises:
            ValueError: if a query leaves no room for its passage.
        """
        template = self.template if template is None else template
        texts = list(dict.fromkeys(query for query, _ in pairs))
        query_ids = self.encode(list(map(template.query, texts)), query_max_length, template.query_end)
        queries = dict(zip(texts, query_ids, strict=True))
        passages = self.encode(
            [template.passage(passage) for _, passage in pairs], passage_max_length, template.passage_end
        )
        return [
            self.join(queries[query], passage, max_length, template)
            for (query, _), passage in zip(pairs, passages, strict=True)
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
        beside = len(self.fixed(template.before)) + self.prompt_length(template)
        query_max_length = query_max_length or max_length * 3 // 4
        if not query_max_length:
            raise ValueError(f"max_length={max_length} leaves no token of a query, which gets three quarters of it.")
        return self.build(pairs, query_max_length, max_length, max_length + beside, template)

    def join(
        self, query_ids: list[int], passage_ids: list[int], max_length: int, template: Template | None = None
    ) -> TokenizedPair:
        """Build the sequence; the passage is cut so that all before the prompt part holds `max_length` tokens.

        Raises:
            ValueError: if the query leaves no room for its passage.
        """
        template = self.template if template is None else template
        head = self.bos_ids + self.fixed(template.before) + query_ids + self.fixed(template.between)
        tail = self.fixed(template.behind) + self.fixed(template.prompt)
        room = max_length - len(head)
        end_ids = self.fixed(template.passage_end)
        if room < max(len(end_ids), min(1, len(passage_ids))):
            raise ValueError(
                f"a query of {len(query_ids)} tokens leaves no room for its passage: with "
                f"{len(head) - len(query_ids)} tokens beside it, it must fit into {max_length}. "
                "Cut queries shorter or raise the maximal length."
            )
        if len(passage_ids) > room:
            passage_ids = passage_ids[: room - len(end_ids)] + end_ids
        return TokenizedPair(head + passage_ids + tail, len(head), len(tail))
