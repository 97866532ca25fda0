"""Which model it is: a digest by which results of the same weights are known again."""

from __future__ import annotations

import hashlib
import json
import tempfile
from io import BytesIO
from pathlib import Path

import torch

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker


def model_fingerprint(reranker: MatryoshkaReranker) -> str:
    """SHA-256 of what scores depend on but for a call's options: configuration, weights as loaded, merged and
    quantized, tokenizer."""
    digest = hashlib.sha256()
    config = {name: value for name, value in reranker.config.to_dict().items() if name != "_name_or_path"}
    digest.update(json.dumps([config, reranker.quantization], sort_keys=True, default=str).encode())
    for name, weight in reranker.model.state_dict().items():
        if isinstance(weight, torch.Tensor):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:  # what PyTorch packs for products in int8
            packed = BytesIO()
            torch.save(weight, packed)
            digest.update(name.encode() + packed.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        reranker.tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
