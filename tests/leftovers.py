"""What earlier runs leave in a directory that a checkpoint is written to."""

import json
import shutil
from pathlib import Path

from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan
from flagembedding_matryoshka.setting import Setting
from tests.shipped import write_fine_tuned

OWN = ("notes.txt", "README.md", "pytorch_model.bin", "checkpoint-3/adapter_config.json", "merged_model/notes.txt")
"""Files of a user, which nothing removes."""


def adapters(directory, layerwise, raw):
    """Adapters on another base."""
    written = write_fine_tuned(str(raw), directory.parent / "adapters")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(written / name, directory)


def plan(directory, layerwise, raw):
    """What was measured of other weights."""
    exits = tuple(json.loads((layerwise / "config.json").read_text()).get("exits") or (2, 3, 4, 5, 6))
    about = {"exit_layers": exits, "adapters": (), "data": "d/test", "queries": 9, "candidates": "BM25's first 10"}
    Plan(**about, settings=(Measurement(Setting(exits[-1]), 1.0, 1.0),)).write(directory / PLAN_NAME)


def words(directory, layerwise, raw):
    """Words and lengths of a CrossEncoder."""
    text = json.dumps({"prompt": "Is it?", "query_instruction": "Q: ", "max_length": 9})
    (directory / "matryoshka_config.json").write_text(text)


def shards(directory, layerwise, raw):
    """Weights in two files, and where each lies."""
    for number in (1, 2):
        shutil.copy(layerwise / "model.safetensors", directory / f"model-0000{number}-of-00002.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def weights(directory, layerwise, raw):
    """Weights in one file."""
    shutil.copy(layerwise / "model.safetensors", directory)


def merged(directory, layerwise, raw):
    """A model with its adapters merged."""
    shutil.copytree(layerwise, directory / "merged_model", dirs_exist_ok=True)


def chat(directory, layerwise, raw):
    """A chat template of another tokenizer."""
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")


KINDS = (adapters, plan, words, shards, weights, merged, chat)


def leave(directory, layerwise, raw, kinds=KINDS):
    """Make `directory`, with files of a user and what some earlier runs have left. Returns its path."""
    for name in OWN:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}" if name.endswith(".json") else "mine")
    for kind in kinds:
        kind(directory, Path(layerwise), Path(raw))
    return directory


def files(directory):
    """The names of all files below a directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
