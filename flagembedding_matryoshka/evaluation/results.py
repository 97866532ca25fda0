"""Results of settings and their store on disk: a later run reads them if its conditions are the same."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.runs import Run, from_trec, mean, to_trec
from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.inference.fingerprint import model_fingerprint
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.setting import Setting

PACKAGES = ("flagembedding_matryoshka", "torch", "transformers", "peft")
"""Packages whose versions are conditions of a result."""


@dataclass(frozen=True)
class Result:
    """Cost and quality of a setting.

    Attributes:
        setting: the setting.
        flops_per_pair: floating-point operations, the mean of all pairs.
        pairs_per_second: speed on the timed sample.
        peak_memory: bytes during the timed sample, see [`~flagembedding_matryoshka.evaluation.measure.peak_memory`];
            None if unknown.
        per_query: measure to its value for each query, in the order of the candidates.
    """

    setting: Setting
    flops_per_pair: float
    pairs_per_second: float
    peak_memory: int | None
    per_query: dict[str, list[float]]

    def mean(self, measure: str) -> float:
        """Return the mean of a measure over all queries."""
        return mean(self.per_query[measure])


class Store:
    """Results in `settings/` and runs in `runs/` of an output directory.

    Args:
        directory: the output directory.
        conditions: JSON values of all conditions of the results, apart from the setting.
    """

    def __init__(self, directory: Path, conditions: dict[str, Any]) -> None:
        self.directory = directory
        self.conditions = conditions

    def substore(self, name: str, conditions: Mapping[str, Any]) -> Store:
        """Return a store in the subdirectory `name`, under this store's conditions and further ones."""
        return Store(self.directory / name, {**self.conditions, **conditions})

    def load(self, setting: Setting) -> Result | None:
        """Return the result of a setting, None if it was not saved under the same conditions or its run has changed."""
        try:
            stored = json.loads(self._path(setting).read_bytes())
            run = self._run_path(setting).read_bytes()
            if stored["fingerprint"] != self._fingerprint(setting) or stored["run"] != hashlib.sha256(run).hexdigest():
                return None
            values = {field.name: stored[field.name] for field in fields(Result) if field.name != "setting"}
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            return None
        return Result(setting=setting, **values)

    def save(self, result: Result, run: Run) -> None:
        """Write the run, and then the result with the run's SHA-256."""
        text = to_trec(run, slug(result.setting))
        write_text(self._run_path(result.setting), text)
        checks = {
            "fingerprint": self._fingerprint(result.setting),
            "run": hashlib.sha256(text.encode()).hexdigest(),
        }
        write_text(self._path(result.setting), json.dumps(checks | asdict(result), indent=1) + "\n")

    def run(self, setting: Setting) -> Run:
        """Return the saved run of a setting. Its scores have the nine digits of the file.

        Raises:
            FileNotFoundError: if no run was saved.
        """
        return from_trec(self._run_path(setting).read_text(encoding="utf-8"))

    def _path(self, setting: Setting) -> Path:
        return self.directory / "settings" / f"{slug(setting)}.json"

    def _run_path(self, setting: Setting) -> Path:
        return self.directory / "runs" / f"{slug(setting)}.trec"

    def _fingerprint(self, setting: Setting) -> str:
        values = asdict(setting)
        if not setting.store_layer:  # results from before there were store layers keep their fingerprint
            del values["store_layer"]
        conditions = json.dumps([self.conditions, values], sort_keys=True)
        return hashlib.sha256(conditions.encode()).hexdigest()


def conditions(
    reranker: MatryoshkaReranker, candidates: Candidates, timed_pairs: int, recall_at: int
) -> dict[str, Any]:
    """Return all conditions that results depend on, apart from the setting.

    The re-ranker's own fusion weight is no condition: `measure_settings` gets the weight as an argument.
    """
    options = [field.name for field in fields(ScoringOptions) if field.name != "fusion"]
    return {
        "model": model_fingerprint(reranker),
        "options": {name: getattr(reranker, name) for name in options},
        "candidates": candidates.fingerprint(),
        "machine": machine_of(reranker),
        "timed_pairs": timed_pairs,
        "recall_at": recall_at,
    }


def slug(setting: Setting) -> str:
    """Return a name for the files of a setting."""
    cascade = [f"{layer}-{share}" for layer, share in setting.cascade]
    width = [f"ratio{setting.compress_ratio}", *map(str, setting.compress_layers)] if setting.compress_ratio > 1 else []
    store = [f"store{setting.store_layer}"] if setting.store_layer else []
    return "_".join([*(["cascade", *cascade] if cascade else []), f"layer{setting.depth}", *width, *store])


def machine_of(reranker: MatryoshkaReranker) -> dict[str, Any]:
    """Return the machine of a re-ranker and its dtype."""
    return {"dtype": str(reranker.model.dtype).removeprefix("torch.")} | machine(reranker.target_devices)


def machine(devices: Sequence[str]) -> dict[str, Any]:
    """Return the names of devices, the number of processors and threads, and versions."""
    return {
        "devices": [device_name(device) for device in devices],
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def device_name(device: str) -> str:
    """Return the product name of a device, as far as torch knows it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return str(capabilities.get("cpu_name", platform.processor()))
