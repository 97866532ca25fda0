"""Texts cut to lengths that a request asks for, as texts, so that it can still share batches with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.text.encoding import whole_characters

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


def shorten(
    reranker: MatryoshkaReranker, query: str, documents: Sequence[str], lengths: Lengths
) -> tuple[str, list[str]]:
    """Query and documents of these lengths at most.

    Raises:
        ValueError: if they must not be cut and do not fit, or `pair` leaves no room for a document.
    """
    given = [query, *documents]
    if lengths.query is not None:
        query = _cut(reranker, query, lengths.query, keep_end=False)
    texts = list(documents)
    if lengths.document is not None:
        texts = [_cut(reranker, text, lengths.document, lengths.keep_end) for text in texts]
    if lengths.refuse and [query, *texts] != given:
        raise ValueError(
            "the request wants no text cut, and has longer ones than its "
            f"max_tokens_per_query={lengths.query} or max_tokens_per_doc={lengths.document}."
        )
    if not texts or not (lengths.refuse or lengths.keep_end or lengths.pair is not None):
        return query, texts
    shared, own = reranker.count_tokens(query, texts)
    whole_shared, whole = reranker.count_tokens(query, texts, max_length=UNLIMITED, query_max_length=UNLIMITED)
    if lengths.refuse and (whole_shared, whole) != (shared, own):
        raise ValueError(
            f"query and document must fit into {reranker.max_length} tokens, for the request wants none of them cut; "
            f"the longest have {whole_shared + max(whole)} with separators and prompt."
        )
    (beside,) = reranker.count_tokens(query, [""])[1]
    cut_by_the_server = [tokens for tokens, all_tokens in zip(own, whole, strict=True) if tokens < all_tokens]
    rooms = [max(cut_by_the_server) - beside] if cut_by_the_server else []
    if lengths.pair is not None:
        if lengths.pair <= shared + beside:
            raise ValueError(
                f"truncate_prompt_tokens={lengths.pair} leaves no room for a document: the query and what stands "
                f"around both have {shared + beside}."
            )
        rooms.append(lengths.pair - shared - beside)
    if rooms and max(whole) - beside > min(rooms):
        if lengths.refuse:
            raise ValueError(
                f"the request wants no text cut, and the longest have {shared + max(whole)} tokens, more than its "
                f"truncate_prompt_tokens={lengths.pair}."
            )
        for index, text in enumerate(texts):
            if whole[index] - beside > min(rooms):
                texts[index] = _fitted(reranker, query, text, min(rooms), beside, lengths.keep_end)
    return query, texts


def _fitted(reranker: MatryoshkaReranker, query: str, text: str, room: int, beside: int, keep_end: bool) -> str:
    """`text` cut so that it adds at most `room` tokens; a part of a text may have other tokens than in it."""
    tokens = room
    while True:
        part = _cut(reranker, text, tokens, keep_end)
        (own,) = reranker.count_tokens(query, [part], max_length=UNLIMITED, query_max_length=UNLIMITED)[1]
        if own - beside <= room or not part:
            return part
        tokens -= own - beside - room


def _cut(reranker: MatryoshkaReranker, text: str, tokens: int, keep_end: bool) -> str:
    """The first, or the last, so many tokens of a text."""
    whole = whole_characters(text)
    encoded = reranker.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    if len(offsets) <= tokens:
        return text
    if tokens <= 0:
        return ""
    return whole[offsets[-tokens][0] :] if keep_end else whole[: offsets[tokens - 1][1]]
