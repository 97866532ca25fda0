"""Tiny re-rankers to export, and pairs of mixed length to compare scores on."""

import random

import torch
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from flagembedding_matryoshka import MatryoshkaReranker
from tests.backbones import BACKBONES, layer_wise, let_heads_differ, write_raw
from tests.qwen import qwen_tokenizer

EXITS = (3, 6)
WORDS = [
    *(
        "how",
        "does",
        "a",
        "wing",
        "lift",
        "air",
        "flows",
        "faster",
        "over",
        "the",
        "upper",
        "side",
        "heat?",
        "12,",
        "end.",
    ),
    *("question:", "Judge", "(it)"),
]
SHORT = {
    "before": "<|im_start|>",
    "query_instruction": "",
    "between": "<|im_end|>",
    "passage_instruction": "",
    "behind": "<|im_end|>",
    "prompt": "",
    "instructed": {"query_instruction": "{instruction} "},
    "bos": "tokenizer",
}
"""Few words, so that a window of 9 tokens at the end still holds words of the document."""
CLASSIFIERS = [name for name, tiny in BACKBONES.items() if tiny.config in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING]
"""Backbones of which transformers has a sequence classifier."""
CAPPED = tuple(name for name, tiny in BACKBONES.items() if "final_logit_softcapping" in tiny.values)


def mixed_pairs(number=50):
    """Pairs of a short query and a document of up to 60 words."""
    draw = random.Random(0)
    return [
        (" ".join(draw.choices(WORDS, k=draw.randint(1, 9))), " ".join(draw.choices(WORDS, k=draw.randint(0, 60))))
        for _ in range(number)
    ]


def write_reranker(name, path, template, tokenizer=None, **values):
    """A layer-wise checkpoint of a backbone, whose heads differ, with a tokenizer that splits text as Qwen's does."""
    special = {} if tokenizer is not None else {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    tokenizer = qwen_tokenizer() if tokenizer is None else tokenizer
    raw = write_raw(name, tokenizer, path / "raw", **{"max_position_embeddings": 1024} | special | values)
    model = layer_wise(raw, template=template)
    let_heads_differ(model)
    model.save_pretrained(path / "ours")
    tokenizer.save_pretrained(path / "ours")
    return path / "ours"


def load(path, **options):
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", **options)


def uncapped(name, scores):
    """The scores that a decoder's cap was applied to."""
    cap = BACKBONES[name].values.get("final_logit_softcapping")
    scores = torch.tensor(scores, dtype=torch.float64)
    return (scores if cap is None else cap * torch.atanh(scores / cap)).float()
