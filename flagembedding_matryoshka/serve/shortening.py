"""Texts cut to lengths that a request asks for, as texts, so that it can still share batches with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.text.encoding import TextEncoder

UNLIMITED = 2**31


@dataclass(frozen=True)
class Lengths:
    """What a request says about lengths, in tokens; None is nothing.

    Attributes:
        query, document: of each, at most.
        pair: of query, document and what stands around them, at most.
        keep_end: whether a document that is too long loses its beginning.
        refuse: whether a request is refused whose texts do not fit as they are.
    """

    query: int | None = None
    document: int | None = None
    pair: int | None = None
    keep_end: bool = False
    refuse: bool = False


@dataclass(frozen=True)
class Shortened:
    """Texts, and whether each document, or the query beside it, is longer than what is left of it."""

    query: str
    documents: Sequence[str]
    is_cut: Sequence[bool]


class Shortener:
    """Cuts texts for a re-ranker; very long ones are tokenised no further than that takes."""

    def __init__(self, reranker: MatryoshkaReranker) -> None:
        self._reranker = reranker
        self._encoder = TextEncoder(reranker.tokenizer)

    def refuse_too_long(self, instruction: str | None) -> None:
        """Raise ValueError if an instruction has more than `max_length` tokens: some templates have it beside what that
        limits."""
        most = self._reranker.max_length
        if instruction is not None and len(self._encoder.beginnings([instruction], most + 1)[0]) > most:
            raise ValueError(
                f"the instruction {instruction!r:.80} has more than {most} tokens, the server's max_length."
            )

    def shorten(
        self, query: str, documents: Sequence[str], lengths: Lengths, instruction: str | None = None
    ) -> Shortened:
        """Query and documents of these lengths at most.

        Args:
            instruction: of the query; None is the model's own, "" is none.

        Raises:
            ValueError: if they must not be cut and do not fit, or `pair` leaves no room for a document.
        """
        whole_query, texts = query, list(documents)
        if lengths.query is not None:
            query = self._encoder.cut(query, lengths.query)
        if lengths.document is not None:
            texts = [self._encoder.cut(text, lengths.document, lengths.keep_end) for text in texts]
        if lengths.refuse and [query, *texts] != [whole_query, *documents]:
            raise ValueError(
                "the request wants no text cut, and has longer ones than its "
                f"max_tokens_per_query={lengths.query} or max_tokens_per_doc={lengths.document}."
            )
        if texts and (lengths.refuse or lengths.keep_end or lengths.pair is not None):
            texts = self._fit(query, texts, lengths, instruction)
        cut = [text != document for text, document in zip(texts, documents, strict=True)]
        return Shortened(query, texts, [query != whole_query or one for one in cut])

    def _fit(self, query: str, texts: Sequence[str], lengths: Lengths, instruction: str | None) -> list[str]:
        """Documents that fit beside the query."""
        pairs = self._reranker.tokenize([(query, text) for text in texts], instruction=instruction)
        if lengths.refuse and any(pair.is_cut for pair in pairs):
            raise ValueError(
                f"query and document must fit into {self._reranker.max_length} tokens, for the request wants none of "
                f"them cut; document {next(place for place, pair in enumerate(pairs) if pair.is_cut)} does not."
            )
        shared, (beside,) = self._reranker.count_tokens(query, [""], instruction=instruction)
        rooms = [pair.passage_length + pair.prompt_length - beside for pair in pairs if pair.passage_is_cut][:1]
        if lengths.pair is not None:
            if lengths.pair <= shared + beside:
                raise ValueError(
                    f"truncate_prompt_tokens={lengths.pair} leaves no room for a document: the query and what stands "
                    f"around both have {shared + beside}."
                )
            rooms.append(lengths.pair - shared - beside)
        if not rooms:
            return list(texts)
        room = min(rooms)
        too_long = [pair.passage_is_cut or pair.passage_length + pair.prompt_length - beside > room for pair in pairs]
        if lengths.refuse and any(too_long):
            raise ValueError(
                f"the request wants no text cut, and the longest have {max(map(len, pairs))} tokens, more than its "
                f"truncate_prompt_tokens={lengths.pair}."
            )
        return [
            self._fitted(query, text, room, beside, lengths.keep_end, instruction) if is_too_long else text
            for text, is_too_long in zip(texts, too_long, strict=True)
        ]

    def _fitted(self, query: str, text: str, room: int, beside: int, keep_end: bool, instruction: str | None) -> str:
        """`text` cut so that it adds at most `room` tokens; a part of a text may have other tokens than in it."""
        tokens = room
        while True:
            part = self._encoder.cut(text, tokens, keep_end)
            limits = {"max_length": UNLIMITED, "query_max_length": UNLIMITED}
            _, (own,) = self._reranker.count_tokens(query, [part], **limits, instruction=instruction)
            if own - beside <= room or not part:
                return part
            tokens -= own - beside - room
