"""The fingerprint of a checkpoint's files."""

import json
import os
import shutil

import pytest

from flagembedding_matryoshka.checkpoints import weights
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.checkpoints.weights import file_hash, weights_fingerprint
from tests.gguf_files import write_gguf
from tests.shipped import write_fine_tuned


def fingerprint(path, *adapters, **hub):
    return weights_fingerprint(inspect_checkpoint(str(path), **hub), list(map(str, adapters)), **hub)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_any_bit_changes_it_and_the_place_does_not(tiny_layerwise_path, tmp_path):
    model = shutil.copytree(tiny_layerwise_path, tmp_path / "copy")
    expected = fingerprint(tiny_layerwise_path)
    assert fingerprint(model) == expected
    (model / "README.md").write_text("x")
    assert fingerprint(model) == expected
    size = (model / "model.safetensors").stat().st_size
    for place in (size - 1, size // 2, size // 2 + 777):
        flip(model / "model.safetensors", place)
        assert fingerprint(model) != expected
        flip(model / "model.safetensors", place)
    assert fingerprint(model) == expected
    (model / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"copy has no weights: neither model.safetensors nor pytorch_model.bin"
    ):
        fingerprint(model)


def test_shards_are_all_of_it(plain_model, tiny_raw_model_path, tmp_path):
    plain_model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    expected = fingerprint(tmp_path)
    for shard in shards:
        flip(shard, -1)
        assert fingerprint(tmp_path) != expected
        flip(shard, -1)
    assert fingerprint(tmp_path) == expected
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks files of weights that its model.safetensors.index.json names"):
        fingerprint(tmp_path)


def test_adapters_and_what_they_count_for_are_part_of_it(tiny_raw_model_path, tmp_path):
    adapter = write_fine_tuned(str(tiny_raw_model_path), tmp_path / "adapter")
    expected = fingerprint(adapter)
    base = fingerprint(tiny_raw_model_path)
    assert len({base, expected, fingerprint(adapter, adapter)}) == 3
    assert fingerprint(tiny_raw_model_path, adapter) == expected
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert fingerprint(adapter) != expected
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "99"}))
    assert fingerprint(adapter) == expected
    flip(adapter / "adapter_model.safetensors", -1)
    assert fingerprint(adapter) != expected


def test_of_a_gguf_it_is_the_hash_of_the_file_whatever_became_of_it(plain_model, tiny_tokenizer, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", plain_model, tiny_tokenizer)
    hub = {"cache_dir": str(tmp_path / "cache")}
    expected = fingerprint(path, **hub)
    (converted,) = (tmp_path / "cache" / "flagembedding_matryoshka" / "gguf").glob("*/model.safetensors")
    assert fingerprint(converted.parent, **hub) == expected
    moved = path.rename(tmp_path / "moved.gguf")
    assert fingerprint(moved, cache_dir=str(tmp_path / "other")) == expected


def test_a_large_file_is_read_once_until_it_changes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(weights, "NOTED_FROM", 4)
    path, cache = tmp_path / "file", str(tmp_path / "cache")
    path.write_bytes(b"12345")
    read = []
    of = weights.Fingerprint.of
    monkeypatch.setattr(weights.Fingerprint, "of", lambda path: read.append(path) or of(path))
    expected = file_hash(path, cache)
    assert file_hash(path, cache) == expected and len(read) == 1
    times = path.stat()
    path.write_bytes(b"12346")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times
    assert file_hash(path, cache) != expected
    (tmp_path / "file").write_bytes(b"12345")
    assert file_hash(path, cache) == expected
    for note in (tmp_path / "cache").rglob("*.json"):
        note.write_text("{")
    assert file_hash(path, cache) == expected
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder is wanted")
    assert file_hash(path, str(blocked)) == expected
    assert "cannot be written" in caplog.text
