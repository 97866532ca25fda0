"""Results on disk: what was measured under the same conditions is not measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.evaluation.machine import machine
from flagembedding_matryoshka.evaluation.metrics import Run, from_trec, mean, to_trec
from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.inference.fingerprint import model_fingerprint
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.setting import Setting


@dataclass(frozen=True)
class Result:
    """What a setting costs and gives.

    Attributes:
        flops_per_pair: floating-point operations, the mean of all pairs.
        pairs_per_second: of the timed sample.
        peak_memory: bytes while it ran, see [`~flagembedding_matryoshka.evaluation.memory.peak_memory`].
        per_query: measure to its value for each query, in the order of the candidates.
    """

    setting: Setting
    flops_per_pair: float
    pairs_per_second: float
    peak_memory: int | None
    per_query: dict[str, list[float]]

    def mean(self, measure: str) -> float:
        """Of all queries."""
        return mean(self.per_query[measure])


class Store:
    """`runs/` and `settings/` of an output directory.

    Args:
        conditions: all that results depend on but the setting, as JSON can hold it.
    """

    def __init__(self, directory: Path, conditions: dict[str, Any]) -> None:
        self.directory = directory
        self.conditions = conditions

    def beside(self, name: str, conditions: Mapping[str, Any]) -> Store:
        """Return a store in the subdirectory `name`, under this store's conditions and further ones."""
        return Store(self.directory / name, {**self.conditions, **conditions})

    def load(self, setting: Setting) -> Result | None:
        """What was saved for `setting` under the same conditions, with its run as it was written; else None."""
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
        """Write the run, and then the result that vouches for it."""
        text = to_trec(run, slug(result.setting))
        write_text(self._run_path(result.setting), text)
        about = {
            "fingerprint": self._fingerprint(result.setting),
            "run": hashlib.sha256(text.encode()).hexdigest(),
        }
        write_text(self._path(result.setting), json.dumps(about | asdict(result), indent=1) + "\n")

    def run(self, setting: Setting) -> Run:
        """The run that was saved for `setting`, with all digits of its scores.

        Raises:
            FileNotFoundError: if none was.
        """
        return from_trec(self._run_path(setting).read_text(encoding="utf-8"))

    def _path(self, setting: Setting) -> Path:
        return self.directory / "settings" / f"{slug(setting)}.json"

    def _run_path(self, setting: Setting) -> Path:
        return self.directory / "runs" / f"{slug(setting)}.trec"

    def _fingerprint(self, setting: Setting) -> str:
        conditions = json.dumps([self.conditions, asdict(setting)], sort_keys=True)
        return hashlib.sha256(conditions.encode()).hexdigest()


def conditions(
    reranker: MatryoshkaReranker, candidates: Candidates, timed_pairs: int, recall_at: int
) -> dict[str, Any]:
    """Return all conditions that results of `evaluate` depend on, apart from the setting.

    The default weight of fusion is none of them: `evaluate` gets the weight as an argument.
    """
    options = [field.name for field in fields(ScoringOptions) if field.name != "fusion"]
    return {
        "model": model_fingerprint(reranker),
        "options": {name: getattr(reranker, name) for name in options},
        "candidates": candidates.fingerprint(),
        "machine": about(reranker),
        "timed_pairs": timed_pairs,
        "recall_at": recall_at,
    }


def slug(setting: Setting) -> str:
    """A setting as a file's name."""
    cascade = [f"{layer}-{share}" for layer, share in setting.cascade]
    width = [f"ratio{setting.compress_ratio}", *map(str, setting.compress_layers)] if setting.compress_ratio > 1 else []
    return "_".join([*(["cascade", *cascade] if cascade else []), f"layer{setting.depth}", *width])


def about(reranker: MatryoshkaReranker) -> dict[str, Any]:
    """On what the re-ranker runs, and in which format."""
    return {"dtype": str(reranker.model.dtype).removeprefix("torch.")} | machine(reranker.target_devices)
