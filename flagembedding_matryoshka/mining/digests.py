"""Digests of texts, files and models: a resumed command compares them with those of the earlier run."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from flagembedding_matryoshka.checkpoints.gguf import locate


def digest_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 of texts in their order."""
    digest = sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def digest_files(paths: Iterable[Path], root: Path) -> str:
    """Return the SHA-256 of files and of their paths below `root`."""
    digest = sha256()
    for path in sorted(paths):
        digest.update(str(path.relative_to(root)).encode())
        with path.open("rb") as file:
            while data := file.read(2**24):
                digest.update(data)
    return digest.hexdigest()


def digest_collection(directory: Path, *splits: str) -> str:
    """Return the SHA-256 of the passages, the queries and the judgements of some splits of a collection."""
    names = ["corpus.jsonl", "queries.jsonl", *(f"qrels/{split}.tsv" for split in splits)]
    return digest_files((directory / name for name in names), directory)


def digest_model(name: str) -> str | None:
    """Return the SHA-256 of the weights and configurations in a model's directory; None for a name on the hub.

    Checkpoints of a training run in the directory are left out.
    """
    model = Path(locate(name))
    if not model.is_dir():
        return None
    files = (path for suffix in ("json", "safetensors", "bin") for path in model.rglob(f"*.{suffix}"))
    return digest_files(
        (path for path in files if not path.relative_to(model).parts[0].startswith(PREFIX_CHECKPOINT_DIR)), model
    )
