"""Registration of the shipped and the published re-rankers in FlagEmbedding's list of models."""

from __future__ import annotations

from FlagEmbedding.inference.reranker import LayerWiseFlagLLMReranker, LightWeightFlagLLMReranker
from FlagEmbedding.inference.reranker.model_mapping import AUTO_RERANKER_MAPPING, RerankerConfig

from flagembedding_matryoshka.checkpoints.gguf import SMOLLM2_NAME
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker

PUBLISHED = (
    *("Matroyshka-ReRanker-passage", "Matroyshka-ReRanker-document", "Matroyshka-ReRanker-beir"),
    *("Qwen3-Reranker-0.6B", "Qwen3-Reranker-4B", "Qwen3-Reranker-8B"),
    *("zerank-1", "zerank-1-small", "zerank-2", "mxbai-rerank-base-v2", "mxbai-rerank-large-v2"),
    *(f"ctxl-rerank-v2-instruct-multilingual-{size}" for size in ("1b", "2b", "6b")),
)
"""The published names, with their spelling."""
INSTEAD = {
    "bge-reranker-v2.5-gemma2-lightweight": LightWeightFlagLLMReranker,
    "bge-reranker-v2-minicpm-layerwise": LayerWiseFlagLLMReranker,
}
"""Published re-rankers with FlagEmbedding's own class for them, which `register` replaces."""


def register(*names: str) -> None:
    """Let `FlagAutoReranker.from_finetuned` build a `MatryoshkaReranker` for "smollm2" and the published names.

    For two of the names this replaces FlagEmbedding's own classes. A second call has no effect.

    Args:
        names: more names. FlagEmbedding looks up the last component of a model's path: `register("output")` is for a
            directory called output. (Its `model_class` is an Enum, which cannot be extended.)

    Raises:
        ValueError: if FlagEmbedding has another class for one of the names. Then none is registered.
    """
    wanted = (SMOLLM2_NAME, *PUBLISHED, *INSTEAD, *names)
    for name in wanted:
        present = AUTO_RERANKER_MAPPING.get(name)
        if present is not None and present.model_class not in (MatryoshkaReranker, INSTEAD.get(name)):
            found, ours = (
                f"{kind.__module__}.{kind.__qualname__}" for kind in (present.model_class, MatryoshkaReranker)
            )
            raise ValueError(
                f"FlagEmbedding has {found} for {name!r}, so that {ours} cannot be registered: use another name."
            )
    for name in wanted:
        AUTO_RERANKER_MAPPING[name] = RerankerConfig(MatryoshkaReranker)
