"""Refuse checkpoints that are no causal decoder of a known model type, by their configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any

ENCODER = "it is an encoder, whose attention is not causal. Its score is read at the first token. Use FlagEmbedding"
LINEAR_ATTENTION = "its linear attention keeps a state of each sequence instead of keys and values of each token"
MULTIMODAL = "it is a multimodal model around a decoder. Save the decoder as a checkpoint of its own"
REASONS = {
    "bert": ENCODER,
    "cohere2": "its model multiplies logits by logit_scale, so that a backbone of it needs a `finish` of its own",
    "deberta-v2": ENCODER,
    "gemma3": f"{MULTIMODAL}, of type 'gemma3_text'",
    "gpt_oss": "its attention has sinks, which add a logit to each softmax",
    "llama_bidirec": "its attention is bidirectional and its score is read from the mean over all tokens",
    "mistral3": f"{MULTIMODAL}, of type 'ministral3' or 'mistral'",
    "modernbert": ENCODER,
    "nanochat": (
        "its model normalises embeddings before the first layer and caps logits, so that a backbone of it needs "
        "`embeddings` and `finish` of its own"
    ),
    "qwen2_5_vl": MULTIMODAL,
    "qwen2_vl": MULTIMODAL,
    "qwen3_5": LINEAR_ATTENTION,
    "qwen3_5_moe": LINEAR_ATTENTION,
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_next": LINEAR_ATTENTION,
    "qwen3_vl": f"{MULTIMODAL}, as transformers has no causal language model of its text part",
    "roberta": ENCODER,
    "t5": "it is an encoder with a decoder",
    "t5gemma": "it is an encoder with a decoder",
    "t5gemma2": "it is an encoder with a decoder",
    "xlm-roberta": ENCODER,
}
"""For each unsupported model type of published re-rankers, the reason why no backbone runs it."""
JINA = "JinaForRanking"
"""Beginning of the architecture of jina-reranker-v3 and later. Their model type is that of Qwen3."""


def refuse_not_causal(path: str | PathLike[str], stored: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a supported model type that is not a causal decoder.

    Args:
        path: path of the checkpoint, for errors.
        stored: content of its config.json.

    Raises:
        ValueError: if attention is not causal in all layers, the model has an encoder and a decoder, or it ranks lists
            of passages.
    """
    for name, value in stored.items():
        if name in ("is_causal", "causal") and value is not None and not value:
            allowed = "true"
        elif ("bidirectional" in name or name == "is_encoder_decoder") and value:
            allowed = "false"
        else:
            continue
        raise ValueError(
            f"{path}: {name} is {value!r} in its configuration, but only {allowed} is allowed: a re-ranker here is a "
            "causal decoder, whose tokens attend to those before them."
        )
    for architecture in stored.get("architectures") or ():
        if architecture.startswith(JINA):
            raise ValueError(
                f"{path}: its architecture is {architecture!r}, which ranks a list of passages in one sequence and "
                "reads scores after a projector. A re-ranker here scores pairs of query and passage."
            )


def refuse_model_type(path: str | PathLike[str], model_type: Any, supported: Collection[str]) -> None:
    """Refuse a checkpoint of a model type that no backbone runs. The error gives the reason if it is known.

    Raises:
        ValueError: if `model_type` is not among `supported`.
    """
    if model_type in supported:
        return
    reason = f" No backbone runs it: {REASONS[model_type]}." if model_type in REASONS else ""
    raise ValueError(
        f"{path} holds a model of type {model_type!r}.{reason} A re-ranker is made or loaded from one of "
        f"{', '.join(sorted(supported))}."
    )
