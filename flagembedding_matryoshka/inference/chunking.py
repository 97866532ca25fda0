"""Chunks of documents that are too long beside their query."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flagembedding_matryoshka.inference.inputs import Pairs
from flagembedding_matryoshka.inference.options import Call
from flagembedding_matryoshka.text.encoding import CHARACTERS, MARGIN, whole_characters
from flagembedding_matryoshka.text.pairs import TokenizedPair

SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
NO_SPACE = re.compile(r"\S")


class Chunk(NamedTuple):
    """The characters of a document from `start` to `end`, which is excluded, tokenised beside the query."""

    start: int
    end: int
    pair: TokenizedPair


class CutDocument(NamedTuple):
    """A document in chunks.

    Attributes:
        chunks: at least one chunk.
        is_truncated: whether a part of the document or of the query is in no chunk.
    """

    chunks: Sequence[Chunk]
    is_truncated: bool


@dataclass(frozen=True)
class Chunking:
    """Cuts documents into chunks.

    Attributes:
        most: number of chunks of a document, at most; None is no limit.
        overlap: number of tokens that a chunk has in common with the previous one.
    """

    call: Call
    most: int | None = None
    overlap: int = 0

    def cut(self, query: str, documents: Sequence[str]) -> list[CutDocument]:
        """Return the chunks of each document. A document that fits is one chunk.

        Raises:
            ValueError: if a query leaves no room for its documents or for this overlap, or the tokenizer does not give
                the offsets of its tokens.
        """
        texts = list(map(whole_characters, documents))
        wholes = self.call.tokenize([(query, text) for text in texts])
        found: list[CutDocument] = []
        for document, text, whole in zip(documents, texts, wholes, strict=True):
            if not whole.passage_is_cut:
                found.append(CutDocument([Chunk(0, len(document), whole)], whole.is_cut))
                continue
            chunks: list[Chunk] = []
            is_truncated = whole.query_is_cut
            for chunk in self._chunks(query, text, room=whole.passage_length):
                if len(chunks) == self.most:
                    is_truncated = True
                    break
                is_truncated |= chunk.pair.passage_is_cut
                chunks.append(chunk)
            # `whole_characters` makes one character of a surrogate pair, which is two characters of the document.
            pairs = [] if len(text) == len(document) else SURROGATE_PAIR.finditer(document)
            joined = [pair.start() - count for count, pair in enumerate(pairs)]  # places in the text
            placed = [
                Chunk(start + bisect_left(joined, start), end + bisect_left(joined, end), pair)
                for start, end, pair in chunks
            ]
            found.append(CutDocument(placed, is_truncated))
        return found

    def _chunks(self, query: str, text: str, room: int) -> Iterator[Chunk]:
        """Yield the chunks of a text. One chunk's length of the text is tokenised at a time."""
        template, tokenizer = self.call.template, self.call.tokenizer
        start = 0
        while True:
            window = text[start : start + (room + MARGIN) * CHARACTERS]
            offsets = tokenizer.passage_offsets(window, template)
            instruction = int((offsets[:, 1] == 0).sum())
            own = room - instruction - len(tokenizer.ids_of(template).passage.end)
            if own < 1:
                raise ValueError(f"the query {query!r:.60} leaves no room for a chunk of a document beside it.")
            if 2 * self.overlap > own:
                raise ValueError(
                    f"overlap is {self.overlap}, but must be at most half of the {own} tokens that a chunk holds "
                    f"beside the query {query!r:.60}."
                )
            kept = min(len(offsets), instruction + own)
            while True:
                length = len(window) if kept == len(offsets) else int(offsets[max(kept, 1) - 1, 1])
                # A part of a text can have more tokens alone than inside the text.
                end = start + max(1, length)
                (pair,) = self.call.tokenize([(query, text[start:end])])
                if not pair.passage_is_cut or length <= 1:
                    break
                kept -= 1
            yield Chunk(start, end, pair)
            if not NO_SPACE.search(text, end):
                return
            overlapped = start + int(offsets[max(kept - self.overlap, 0), 0]) if self.overlap else end
            following = NO_SPACE.search(text, max(start + 1, min(overlapped, end)))
            assert following is not None
            start = following.start()


@dataclass(frozen=True)
class Candidates:
    """One query's documents and their pairs.

    Attributes:
        documents: the texts, "" for a stored passage without one; empty if the call gives tokenised pairs.
        pairs: a pair for each document, or for each chunk.
        cut: the chunks of each document; None if documents are not cut.
        first_stage: the first stage's score of each document; None without fusion.
        ids: with a store, the id or None of each document; empty without a store.
    """

    documents: Sequence[str]
    pairs: Pairs
    cut: Sequence[CutDocument] | None = None
    first_stage: Sequence[float] | None = None
    ids: Sequence[str | None] = ()

    @property
    def first_stage_of_pairs(self) -> Sequence[float] | None:
        """The first stage's score of each pair. A chunk has the score of its document."""
        if self.cut is None or self.first_stage is None:
            return self.first_stage
        return [
            score
            for document, score in zip(self.cut, self.first_stage, strict=True)
            for _ in range(len(document.chunks))
        ]
