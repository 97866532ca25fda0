"""Fingerprints of a checkpoint's weights, by which plans and outputs name the weights that they were made with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers.utils import logging

from flagembedding_matryoshka.checkpoints.adapters import adapter_file
from flagembedding_matryoshka.checkpoints.describing import Files
from flagembedding_matryoshka.checkpoints.gguf import MANIFEST, Fingerprint, checked, locate, resolve
from flagembedding_matryoshka.checkpoints.loading import Checkpoint
from flagembedding_matryoshka.files import write_text

logger = logging.get_logger(__name__)

WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Files of weights, in the order in which transformers looks for them. Each may be in shards, with an index."""
OF_AN_ADAPTER = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "trainable_token_indices",
)
"""Fields of an adapter's configuration that change the effect of its weights."""
NOTED_FROM = 2**26
"""Files of this number of bytes or more have their hash in the cache."""
THREADS = 4


def weights_fingerprint(checkpoint: Checkpoint, peft_paths: Sequence[str | os.PathLike[str]] = (), **hub: Any) -> str:
    """Return the SHA-256 of a checkpoint's files of weights. It does not depend on their path or machine.

    All bytes of the files are hashed. A sample of blocks would be faster, but it would miss changes of a few rows, such
    as trained tokens. The hash of a file of 64 MiB or more is computed once and kept in the cache, with size and times
    of the file. It takes 15 s for a model of 7B parameters in bfloat16, at about 1 GB/s. Only plans, and the settings
    beside an output of `score` and `rank`, have fingerprints.

    A base that was converted from a GGUF file has the hash of that file, because the conversion depends on versions.

    Args:
        peft_paths: further adapters that are merged or attached, in order.
        hub: as in `load_model`.

    Raises:
        FileNotFoundError: if there are no weights.
    """
    cache_dir = hub.get("cache_dir")
    adapters = [*checkpoint.adapters, *(locate(checked(path)) for path in peft_paths)]
    parts: list[Any] = [_of_base(checkpoint.base, cache_dir, checkpoint.hub_of(checkpoint.base, hub))]
    parts += [_of_adapter(adapter, cache_dir, checkpoint.hub_of(adapter, hub)) for adapter in adapters]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _of_base(base: str, cache_dir: str | None, hub: Mapping[str, Any]) -> list[str]:
    place = resolve(locate(base), cache_dir)
    manifest = Path(place, MANIFEST)
    if manifest.is_file():
        return [json.loads(manifest.read_text(encoding="utf-8"))["source_sha256"]]
    files = Files(place, hub)
    for name in WHOLE:
        whole = files.path(name)
        if whole is not None:
            return [file_hash(whole, cache_dir)]
        index = files.json(f"{name}.index.json")
        if index is not None:
            shards = [files.path(shard) for shard in sorted(set(index["weight_map"].values()))]
            if None in shards:
                raise FileNotFoundError(f"{base} lacks files of weights that its {name}.index.json names.")
            with ThreadPoolExecutor(THREADS) as pool:
                return list(pool.map(lambda shard: file_hash(shard, cache_dir), filter(None, shards)))
    raise FileNotFoundError(f"{base} has no weights: neither {' nor '.join(WHOLE)}, whole or in shards.")


def _of_adapter(adapter: str, cache_dir: str | None, hub: Mapping[str, Any]) -> list[Any]:
    config = PeftConfig.from_pretrained(adapter, **hub).to_dict()
    return [file_hash(adapter_file(adapter, **hub), cache_dir), {name: config.get(name) for name in OF_AN_ADAPTER}]


def file_hash(path: Path, cache_dir: str | None = None) -> str:
    """Return the SHA-256 of a file. For a large file it is read from the cache if size and times have not changed.

    Args:
        cache_dir: directory for `flagembedding_matryoshka/weights`; None is `$XDG_CACHE_HOME` or `~/.cache`.
    """
    path = path.resolve()
    stat = path.stat()
    if stat.st_size < NOTED_FROM:
        return Fingerprint.of(path).sha256
    state = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    root = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = hashlib.sha256(str(path).encode()).hexdigest()
    note = root / "flagembedding_matryoshka" / "weights" / f"{name}.json"
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no hash in the cache
        noted = {}
    if {key: noted.get(key) for key in state} == state and "sha256" in noted:
        return noted["sha256"]
    sha256 = Fingerprint.of(path).sha256
    try:
        write_text(note, json.dumps(state | {"sha256": sha256}, indent=1) + "\n")
    except OSError as error:
        logger.warning_once(f"{note} cannot be written ({error}): {path} will be hashed again the next time.")
    return sha256
