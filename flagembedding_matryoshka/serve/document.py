"""The OpenAPI document: summary, tag, errors and examples of each operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import TypedDict

QUERY, DOCUMENTS = "how to sort a list", ["Open a file.", "Sort the items of the list in place."]
USAGE = {"prompt_tokens": 50, "total_tokens": 50}
SCORES = {1: 0.8459, 0: 0.0}
MODEL = {"id": "smollm2", "object": "model", "created": 1767225600, "owned_by": "flagembedding_matryoshka"}
FINGERPRINT = "f86b6e4b24632d1cf2c8b655ca52d87840f0121dc781503c10dbe20ff3a6b085"
HEALTH = {"status": "ok", "model": "smollm2", "fingerprint": FINGERPRINT}
BODIES_OF_RERANK = {
    "Cohere, Jina, Xinference, vLLM": {"query": QUERY, "documents": DOCUMENTS, "top_n": 2},
    "Voyage": {"query": QUERY, "documents": DOCUMENTS, "top_k": 2},
    "text-embeddings-inference": {"query": QUERY, "texts": DOCUMENTS},
    "Several queries": {
        "queries": [{"query": QUERY, "documents": DOCUMENTS}, {"query": "how to open a file", "documents": DOCUMENTS}]
    },
    "A cascade": {"query": QUERY, "documents": DOCUMENTS, "cascade": {"9": 0.5}},
    "A deadline": {"query": QUERY, "documents": DOCUMENTS, "deadline_ms": 200},
    "First-stage scores": {"query": QUERY, "documents": DOCUMENTS, "first_stage": "order", "fusion": 0.35},
}
"""Examples of bodies by their names."""
BODIES_OF_SCORE = {
    "A query and documents": {"text_1": QUERY, "text_2": DOCUMENTS},
    "Pairs": {"text_1": [QUERY, "how to open a file"], "text_2": DOCUMENTS},
}
RANKING: dict[str, Any] = {
    "id": "f8b2d2f5-b21f-4ef3-b4a5-2504a1916499",
    "model": "smollm2",
    "results": [{"index": index, "relevance_score": score} for index, score in SCORES.items()],
    "meta": {"api_version": {"version": "2"}, "tokens": {"input_tokens": 50, "output_tokens": 0}},
    "usage": USAGE,
}
PAIRS = {
    "id": "score-2f9d8c1b7c0f4b0f9a4f6a3f1f1e5a51",
    "object": "list",
    "created": 1767225600,
    "model": "smollm2",
    "data": [{"index": index, "object": "score", "score": SCORES[index]} for index in sorted(SCORES)],
    "usage": USAGE,
}


class Error(TypedDict):
    """One message under the three names that clients of Cohere, TEI and Jina read."""

    message: str
    error: str
    detail: str


@dataclass(frozen=True)
class Operation:
    """An operation of the server: a method of a path.

    Attributes:
        summary: one line.
        tag: name of its group.
        answer: an example of the answer; None is no JSON.
        bodies: examples of the body, by name; empty without a body.
        errors: statuses of its errors.
    """

    summary: str
    tag: str
    answer: Any
    bodies: Mapping[str, Any] = field(default_factory=dict)
    errors: Sequence[int] = ()

    def described(self, path: str, schema: Any = None, model: Any = None, more_errors: Sequence[int] = ()) -> Any:
        """Return arguments of FastAPI's decorators.

        Args:
            schema: JSON schema of the body; None is no body.
            model: type of the answer; None leaves it to FastAPI.
            more_errors: statuses of errors beside those of the operation.
        """
        responses: dict[int | str, Any] = {
            status: {"model": Error, "description": "an error"} for status in (*self.errors, *more_errors)
        }
        if self.answer is not None:
            responses[200] = {"description": "the answer", "content": {"application/json": {"example": self.answer}}}
            if model is not None:
                responses[200]["model"] = model
        described = {
            "summary": self.summary,
            "tags": [self.tag],
            "responses": responses,
            "operation_id": path.strip("/").replace("/", "_"),
        }
        if schema is not None:
            examples = {name: {"value": body} for name, body in self.bodies.items()}
            body = {"required": True, "content": {"application/json": {"schema": schema, "examples": examples}}}
            described["openapi_extra"] = {"requestBody": body}
        return described


ERRORS_OF_RANKING = (408, 413, 415, 422, 429, 500, 503)
RERANK_OPERATION = Operation("Rank documents for a query", "re-ranking", RANKING, BODIES_OF_RERANK, ERRORS_OF_RANKING)
INFINITY_OPERATION = Operation(
    "Rank documents for a query, for clients of Infinity",
    "re-ranking",
    RANKING | {"results": [result | {"document": DOCUMENTS[result["index"]]} for result in RANKING["results"]]},
    {"Infinity": {"query": QUERY, "documents": DOCUMENTS, "return_documents": True}},
    ERRORS_OF_RANKING,
)
SCORE_OPERATION = Operation("Score pairs, in their order", "re-ranking", PAIRS, BODIES_OF_SCORE, ERRORS_OF_RANKING)
LIVE = Operation("Tell that the process runs", "state", {"status": "ok"})
READY = Operation("Tell whether the model can be asked", "state", HEALTH, errors=(503,))
METRICS = Operation("Return metrics for Prometheus", "state", None)
MODELS = Operation("List the model", "model", {"object": "list", "data": [MODEL]})
ONE_MODEL = Operation("Describe the model by its name", "model", MODEL | {"model_type": "rerank"}, errors=(404,))
INFO = Operation(
    "Describe the model and the limits",
    "model",
    {
        "model_id": "smollm2",
        "fingerprint": FINGERPRINT,
        "model_dtype": "float32",
        "model_type": {"reranker": {"id2label": {"0": "relevance"}, "label2id": {"relevance": 0}}},
        "max_input_length": 512,
        "max_batch_tokens": 8192,
        "max_client_batch_size": 1000,
        "max_concurrent_requests": 512,
        "auto_truncate": True,
        "exits": [9, 18],
        "num_hidden_layers": 18,
        "compress_ratios": [1, 2, 4, 8],
        "checkpoint": {"backbone": {"value": "cost_wise_llama", "source": "config.json"}},
        "fusion": {"default": 0.35, "plan": 0.35},
        "presets": {
            name: {"cutoff_layers": [layer], "compress_layers": [], "compress_ratio": 1, "cascade": {}}
            for name, layer in (("fast", 9), ("balanced", 12), ("full", 18))
        },
    },
    errors=(503,),
)
