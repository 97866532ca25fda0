"""The layer-wise MiniCPM re-ranker's configuration in other words."""

from __future__ import annotations

import math
from typing import Any

MINICPM = "minicpm"
"""The model type, which transformers has no configuration for."""


def granite_from_minicpm(stored: dict[str, Any]) -> dict[str, Any]:
    """The configuration of BAAI/bge-reranker-v2-minicpm-layerwise, said in Granite's words.

    Its residual branches are scaled by scale_depth / √(all layers), whichever of them are loaded (MiniCPM, arXiv
    2404.06395, section 4.2), and a simple head reads the state itself, without MiniCPM's division of logits.
    """
    kind = stored.get("head_type") if stored.get("head_multi") else None
    if kind != "simple":
        raise ValueError(
            f"a MiniCPM with head_multi={stored.get('head_multi')} and head_type={stored.get('head_type')!r}: only "
            "head_multi=True with head_type='simple', one linear map per exit, can be read."
        )
    own = ("auto_map", "dim_model_base", "head_multi", "head_type", "scale_depth", "scale_emb")
    head_dim = stored["hidden_size"] // stored["num_attention_heads"]
    kept = {name: value for name, value in stored.items() if name not in own and value is not None}
    return kept | {
        "layer_wise": True,
        "tie_word_embeddings": False,
        "embedding_multiplier": stored["scale_emb"],
        "residual_multiplier": stored["scale_depth"] / math.sqrt(stored["num_hidden_layers"]),
        "attention_multiplier": 1 / math.sqrt(head_dim),
        "logits_scaling": 1.0,
        "template": stored.get("template", "minicpm"),
    }
