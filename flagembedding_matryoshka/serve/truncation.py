"""Truncate texts to the lengths of a request. The results are texts, so that the request can share batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.text.encoding import TextEncoder

UNLIMITED = 2**31


@dataclass(frozen=True)
class Lengths:
    """The lengths that a request allows, in tokens; None is no limit.

    Attributes:
        query, document: most tokens of each.
        pair: most tokens of query, document and the template's words around them.
        keep_end: whether documents lose their beginning instead of their end.
        refuse: whether a request with texts that are too long is refused.
    """

    query: int | None = None
    document: int | None = None
    pair: int | None = None
    keep_end: bool = False
    refuse: bool = False


@dataclass(frozen=True)
class TruncatedTexts:
    """Texts within the lengths, and for each document whether it or the query was truncated."""

    query: str
    documents: Sequence[str]
    is_cut: Sequence[bool]


class Truncator:
    """Truncate texts for a re-ranker. Of a very long text only the tokens that this needs are computed."""

    def __init__(self, reranker: MatryoshkaReranker) -> None:
        self._reranker = reranker
        self._encoder = TextEncoder(reranker.tokenizer)

    def refuse_too_long(self, instruction: str | None) -> None:
        """Raise ValueError if an instruction has more than `max_length` tokens, which not all templates count it in."""
        most = self._reranker.max_length
        if instruction is not None and len(self._encoder.beginnings([instruction], most + 1)[0]) > most:
            raise ValueError(
                f"the instruction {instruction!r:.80} has more than {most} tokens, the server's max_length."
            )

    def truncate(
        self, query: str, documents: Sequence[str], lengths: Lengths, instruction: str | None = None
    ) -> TruncatedTexts:
        """Truncate query and documents to the given lengths.

        Args:
            instruction: instruction of the query; None is the model's own, "" is none.

        Raises:
            ValueError: if texts are too long and `lengths.refuse` is set, or `lengths.pair` leaves no room for a
                document.
        """
        whole_query, texts = query, list(documents)
        if lengths.query is not None:
            query = self._encoder.cut(query, lengths.query)
        if lengths.document is not None:
            texts = [self._encoder.cut(text, lengths.document, lengths.keep_end) for text in texts]
        if lengths.refuse and [query, *texts] != [whole_query, *documents]:
            raise ValueError(
                "truncate=false, but query or documents are longer than "
                f"max_tokens_per_query={lengths.query} or max_tokens_per_doc={lengths.document} allows."
            )
        if texts and (lengths.refuse or lengths.keep_end or lengths.pair is not None):
            texts = self._fit(query, texts, lengths, instruction)
        cut = [text != document for text, document in zip(texts, documents, strict=True)]
        return TruncatedTexts(query, texts, [query != whole_query or one for one in cut])

    def _fit(self, query: str, texts: Sequence[str], lengths: Lengths, instruction: str | None) -> list[str]:
        """Truncate documents so that each fits into a sequence with the query."""
        pairs = self._reranker.tokenize([(query, text) for text in texts], instruction=instruction)
        if lengths.refuse and any(pair.is_cut for pair in pairs):
            raise ValueError(
                f"truncate=false, but document {next(place for place, pair in enumerate(pairs) if pair.is_cut)} and "
                f"the query do not fit into {self._reranker.max_length} tokens."
            )
        shared, (beside,) = self._reranker.count_tokens(query, [""], instruction=instruction)
        rooms = [pair.passage_length + pair.prompt_length - beside for pair in pairs if pair.passage_is_cut][:1]
        if lengths.pair is not None:
            if lengths.pair <= shared + beside:
                raise ValueError(
                    f"truncate_prompt_tokens={lengths.pair} leaves no room for a document: query and template "
                    f"have {shared + beside} tokens."
                )
            rooms.append(lengths.pair - shared - beside)
        if not rooms:
            return list(texts)
        room = min(rooms)
        too_long = [pair.passage_is_cut or pair.passage_length + pair.prompt_length - beside > room for pair in pairs]
        if lengths.refuse and any(too_long):
            raise ValueError(
                f"truncate=false, but the longest sequence has {max(map(len, pairs))} tokens, more than "
                f"truncate_prompt_tokens={lengths.pair}."
            )
        return [
            self._fitted(query, text, room, beside, lengths.keep_end, instruction) if is_too_long else text
            for text, is_too_long in zip(texts, too_long, strict=True)
        ]

    def _fitted(self, query: str, text: str, room: int, beside: int, keep_end: bool, instruction: str | None) -> str:
        """Truncate `text` so that it adds at most `room` tokens. A truncated text may be tokenised differently."""
        tokens = room
        while True:
            part = self._encoder.cut(text, tokens, keep_end)
            limits = {"max_length": UNLIMITED, "query_max_length": UNLIMITED}
            _, (own,) = self._reranker.count_tokens(query, [part], **limits, instruction=instruction)
            if own - beside <= room or not part:
                return part
            tokens -= own - beside - room
