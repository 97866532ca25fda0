"""From a query and a passage to token ids and part lengths; the only home of prompt, separator and truncation.

[bos] query sep passage sep prompt
|query part|           |prompt part|
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

QUERY_INSTRUCTION, PASSAGE_INSTRUCTION = "A: ", "B: "
PROMPT = "Predict whether passage B contains an answer to query A."
SEPARATOR = "\n"
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


def instruct(template: str, instruction: str | None, text: str) -> str:
    """`text` with an instruction, as FlagEmbedding's templates put them together; without one it stays as it is."""
    return text if instruction is None else template.replace("\\n", "\n").format(instruction, text)


def whole_characters(text: str) -> str:
    """`text` with its surrogate pairs joined and halves of them replaced by U+FFFD: JSON can spell what no tokenizer
    reads."""
    if text.isascii() or not SURROGATES.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class PairTokenizer:
    """Joins tokenised queries and passages into input sequences.

    Args:
        tokenizer: used without special tokens; its bos opens a sequence unless it is also the pad token.
        separator: text behind the query and behind the passage.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str = SEPARATOR) -> None:
        self.tokenizer = tokenizer
        has_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.pad_token_id
        self.bos_ids = [tokenizer.bos_token_id] if has_bos else []
        self.separator_ids = self.encode([separator])[0]

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of each text, cut to `max_length` tokens."""
        if not texts:
            return []
        # The tokenizer's own truncation is state that threads would share, and its warning of long input is moot here.
        texts = [whole_characters(text) for text in texts]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [ids[:max_length] for ids in encoded["input_ids"]]

    def beside(self, prompt: str) -> int:
        """Tokens of the prompt part: `prompt` and the separator in front of it."""
        return len(self.separator_ids) + len(self.encode([prompt])[0])

    def build(
        self,
        pairs: Sequence[tuple[str, str]],
        prompt: str,
        query_max_length: int,
        passage_max_length: int,
        max_length: int,
    ) -> list[TokenizedPair]:
        """Input sequences of query and passage, instructions included; a query that several share is tokenised once.

        Args:
            prompt: stands behind the passage.
            query_max_length, passage_max_length: tokens that query and passage are cut to at most.
            max_length: tokens before the prompt part; the passage is cut to what the query leaves of them.

        Raises:
            ValueError: if a query leaves no room for its passage.
        """
        texts = list(dict.fromkeys(query for query, _ in pairs))
        queries = dict(zip(texts, self.encode(texts, query_max_length), strict=True))
        passages = self.encode([passage for _, passage in pairs], passage_max_length)
        (prompt_ids,) = self.encode([prompt])
        return [
            self.join(queries[query], passage, prompt_ids, max_length)
            for (query, _), passage in zip(pairs, passages, strict=True)
        ]

    def join(
        self, query_ids: list[int], passage_ids: list[int], prompt_ids: list[int], max_length: int
    ) -> TokenizedPair:
        """Build the sequence; the passage is cut so that all before the prompt part holds `max_length` tokens.

        Raises:
            ValueError: if the query leaves no room for its passage.
        """
        head = self.bos_ids + query_ids + self.separator_ids
        tail = self.separator_ids + prompt_ids
        room = max_length - len(head)
        if room < min(1, len(passage_ids)):
            raise ValueError(
                f"a query of {len(query_ids)} tokens leaves no room for its passage: with "
                f"{len(head) - len(query_ids)} tokens beside it, it must fit into {max_length}. "
                "Cut queries shorter or raise the maximal length."
            )
        return TokenizedPair(head + passage_ids[:room] + tail, len(head), len(tail))
