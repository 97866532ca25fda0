"""What clients expect back: a form for each kind of them."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flagembedding_matryoshka.inference.calibration import Normalizer
from flagembedding_matryoshka.inference.scoring import Hit, best_first

OF_HITS = ("cutoff_layer", "chunk", "is_truncated", "first_stage_score", "fused_score")
GAP = 0.1
"""Distance between the lowest fused score of an exit and the lowered scores of the next shallower one."""

Scale = Callable[[float, int], float]
"""Turns a raw score that was read at an exit into the score that an answer shows."""


@dataclass(frozen=True)
class Scored:
    """A request's scores.

    Attributes:
        hits: for each document what `MatryoshkaReranker.rank` says of it, not normalised.
        tokens: that were read for it.
        model: its name.
        scale: gives the scores that the answer shows.
        depth: the exit of hits that name none.
        min_score: hits that would show a lower score are left out; None leaves out none.
        operations: floating-point operations that were spent on it, if they were asked for.
        fusion: weight of the first stage's scores; None if the hits have no fused scores.
        is_raw: whether the answer has raw scores.
    """

    hits: Sequence[Hit]
    tokens: int
    model: str
    scale: Scale
    depth: int
    min_score: float | None = None
    operations: int | None = None
    fusion: float | None = None
    is_raw: bool = False

    def best(self, name: str, count: int | None) -> list[dict[str, Any]]:
        """Return the best documents, best first; documents of deeper exits rank first.

        Args:
            name: field of the score.
            count: number of documents to return at most; None is all. Documents that `min_score` leaves out do not
                count.

        Returns:
            For each document "index", the score under `name` and the fields of OF_HITS that it has. Fused hits have a
            score under `name` that falls with the rank, because clients sort by it. Their "model_score" is the model's
            own score, which `min_score` is compared with.
        """
        fused = None if self.fusion is None else self._fused_shown(self.fusion)
        found: list[dict[str, Any]] = []
        for index in best_first(self.hits):
            if len(found) == count:
                break
            hit = self.hits[index]
            own = self.scale(hit["score"], hit.get("cutoff_layer", self.depth))
            if self.min_score is not None and own < self.min_score:
                continue
            shown = {name: own} if fused is None else {name: fused[index], "model_score": own}
            found.append({"index": index} | shown | {key: value for key, value in hit.items() if key in OF_HITS})
        return found

    def _fused_shown(self, weight: float) -> list[float]:
        """Return the fused score of each hit, as the answer shows it.

        Fused scores of several exits are standard scores among different candidates. Scores of a shallower exit are
        lowered below those of all deeper exits. Unless scores are raw, the sigmoid of fused score / (1 + weight), the
        weighted mean of both standard scores, is returned: without the division a large weight would make it 1.
        """
        exits: dict[int, list[int]] = {}
        for place, hit in enumerate(self.hits):
            exits.setdefault(hit.get("cutoff_layer", self.depth), []).append(place)
        shown, floor = [0.0] * len(self.hits), math.inf
        for _, places in sorted(exits.items(), reverse=True):
            fused = [self.hits[place]["fused_score"] for place in places]
            lowered = min(0.0, floor - GAP - max(fused))
            floor = min(fused) + lowered
            for place, score in zip(places, fused, strict=True):
                shown[place] = score + lowered
        return shown if self.is_raw else [_sigmoid(score / (1 + weight)) for score in shown]

    @property
    def usage(self) -> dict[str, int]:
        counted = {} if self.operations is None else {"operations": self.operations}
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens} | counted


def cohere_answer(
    scored: Scored, count: int | None, documents: Sequence[str | Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Cohere's answer with Jina's `usage`.

    Args:
        documents: what is sent back; None is nothing.
    """
    results = scored.best("relevance_score", count)
    if documents is not None:
        for result in results:
            document = documents[result["index"]]
            result["document"] = {"text": document} if isinstance(document, str) else document
    return {
        "id": str(uuid.uuid4()),
        "model": scored.model,
        "results": results,
        "meta": {"api_version": {"version": "2"}, "tokens": {"input_tokens": scored.tokens, "output_tokens": 0}},
        "usage": scored.usage,
    }


def voyage_answer(scored: Scored, count: int | None, texts: Sequence[str] | None) -> dict[str, Any]:
    """Voyage's answer."""
    data = scored.best("relevance_score", count)
    if texts is not None:
        for result in data:
            result["document"] = texts[result["index"]]
    return {"object": "list", "data": data, "model": scored.model, "usage": scored.usage}


def tei_answer(scored: Scored, count: int | None, texts: Sequence[str] | None) -> list[dict[str, Any]]:
    """TEI's answer."""
    results = scored.best("score", count)
    if texts is not None:
        for result in results:
            result["text"] = texts[result["index"]]
    return results


def vllm_scores(scored: Scored) -> dict[str, Any]:
    """vLLM's answer to /score, in the order of the request."""
    data = [
        {"object": "score", **result}
        for result in sorted(scored.best("score", None), key=lambda result: result["index"])
    ]
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": scored.model,
        "data": data,
        "usage": scored.usage,
    }


def scale_of(normalize: bool | str, normalizer: Normalizer | None, temperature: float) -> Scale:
    """The scores that an answer shows.

    Args:
        normalize: as of `MatryoshkaReranker`.
        normalizer: of the same; a sigmoid is computed in 64 bits, in which it reaches 1 later.
        temperature: scores are divided by it before the sigmoid.
    """
    if normalizer is None:
        return lambda score, layer: score
    if normalize is True:
        return lambda score, layer: _sigmoid(score / temperature)
    return lambda score, layer: normalizer(torch.tensor(score), layer).item()


def _sigmoid(score: float) -> float:
    small = math.exp(-abs(score))
    return (1 if score >= 0 else small) / (1 + small)
