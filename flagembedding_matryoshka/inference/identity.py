"""The fingerprint of a loaded model."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch


def model_fingerprint(reranker: Any) -> str:
    """Return the SHA-256 of configuration, tokenizer, and weights as loaded, merged and quantized.

    Scores depend on these and on the options of a call.

    Args:
        reranker: a `MatryoshkaReranker`.
    """
    digest = hashlib.sha256()
    config = {name: value for name, value in reranker.config.to_dict().items() if name != "_name_or_path"}
    digest.update(json.dumps([config, reranker.quantization], sort_keys=True, default=str).encode())
    for name, weight in reranker.model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    with tempfile.TemporaryDirectory() as folder:
        reranker.tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
