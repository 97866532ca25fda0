"""Plans: the settings that an evaluation measured, and the choice of one by a budget or a quality."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.checkpoints.gguf import locate
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.checkpoints.weights import weights_fingerprint
from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.inference.calibration import Calibration, from_json, to_json
from flagembedding_matryoshka.inference.fusion import as_weight
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.private import find_file
from flagembedding_matryoshka.setting import Setting

PLAN_NAME = "matryoshka_plan.json"
COMMAND = "python -m flagembedding_matryoshka.evaluation --model {} --data DIR --write_plan"


@dataclass(frozen=True)
class Measurement:
    """A setting with its cost and quality, relative to the full network: deepest exit, full width, no cascade.

    Attributes:
        flops_share: fraction of the full network's operations.
        ndcg_share: fraction of the full network's nDCG@10, on the queries that choose.
        held_out_ndcg_share: the same fraction on the held-out queries; None if it was not measured.
        calibration: map from scores of the setting to probabilities of relevance; None if none was fitted.

    Raises:
        TypeError: if a share is not a number.
        ValueError: if it is not finite, the cost is not above 0, or the quality is negative.
    """

    setting: Setting
    flops_share: float
    ndcg_share: float
    held_out_ndcg_share: float | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        qualities = {"ndcg_share": self.ndcg_share, "held_out_ndcg_share": self.held_out_ndcg_share or 0.0}
        if not 0 < self.flops_share < math.inf or not all(0 <= value < math.inf for value in qualities.values()):
            raise ValueError(f"{self.setting} has flops_share {self.flops_share} and {qualities}")


@dataclass(frozen=True)
class Plan:
    """The measurements of an evaluation.

    Attributes:
        exit_layers: all exits of the model.
        adapters: names of the adapters that were merged or attached, in order, apart from the model's own.
        data, queries, candidates: name of the collection, number of queries that choose, and first stage of the lists.
        settings: all measured settings.
        held_out_queries: number of queries that `held_out_ndcg_share` was measured on.
        scored_with: words around the texts, dtype and quantization, which calibrations depend on; see
            [`~flagembedding_matryoshka.inference.reranker.MatryoshkaReranker.scored_with`].
        weights: the fingerprint of the weights, see
            [`~flagembedding_matryoshka.checkpoints.weights.weights_fingerprint`]; None in plans of older versions.
        fusion: weight of the first stage's scores, chosen on the same queries and lists; None if no weight was chosen.
            A plan has one weight for all settings, because the best weight hardly depends on the setting.

    Raises:
        TypeError: if the weight is not a number.
        ValueError: if the weight is negative or not finite.

    Rounding hardly changes which setting is best, so a plan chooses settings for any dtype. A calibration maps scores,
    so it is used only in the dtype that it was fitted in.
    """

    exit_layers: tuple[int, ...]
    adapters: tuple[str, ...]
    data: str
    queries: int
    candidates: str
    settings: tuple[Measurement, ...]
    held_out_queries: int = 0
    scored_with: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    fusion: float | None = None

    def __post_init__(self) -> None:
        if self.fusion is not None:
            as_weight(self.fusion)

    def choose(self, budget: float | None = None, quality: float | None = None, cascades: bool = True) -> Setting:
        """Return the best setting within `budget`, or the cheapest setting that reaches `quality`. Give one of them.

        Args:
            budget: fraction of the full network's floating-point operations, in (0, 1].
            quality: fraction of the full network's nDCG@10, above 0.
            cascades: whether a setting with a cascade may be chosen.

        Raises:
            ValueError: if both or neither are given, the value is out of its range, or no setting fits; the error names
                the nearest setting.
        """
        settings = [item for item in self.settings if cascades or not item.setting.cascade]
        among = "measured setting" if cascades else "measured setting without a cascade"
        if not settings:
            raise ValueError(f"the plan of {self.data} holds no {among}.")
        if budget is not None and quality is None:
            return _best_within(budget, settings, among)
        if quality is not None and budget is None:
            return _cheapest_reaching(quality, settings, among)
        raise ValueError(f"budget={budget} and quality={quality}: give one of them.")

    def check(self, config: CostWiseConfig, adapters: Sequence[str]) -> None:
        """Raise ValueError if this plan is not of a model with this configuration and these adapters."""
        if list(self.exit_layers) != config.exit_layers:
            raise ValueError(f"it measured exits {list(self.exit_layers)}, and this model has {config.exit_layers}")
        names = adapter_names(adapters)
        if self.adapters != names:
            raise ValueError(f"it measured the model with the adapters {list(self.adapters)}, and not {list(names)}")
        for item in self.settings:
            item.setting.check(config)

    def calibration(self, setting: Setting, layer: int) -> Calibration:
        """Return the map from scores that `setting` reads at exit `layer` to probabilities of relevance.

        Raises:
            ValueError: if no such map was fitted; the error lists the settings that have one.
        """
        wanted, fitted = _as_read(setting, layer), self.calibrations()
        if wanted not in fitted:
            raise ValueError(
                f"normalize='calibrated': the plan of {self.data} has no calibration of {wanted}; it has "
                f"{'; '.join(map(str, fitted)) or 'none at all'}. An evaluation with --calibrate --write_plan fits one "
                "for each setting that it measures."
            )
        return fitted[wanted]

    def calibrations(self) -> dict[Setting, Calibration]:
        """The calibrations of scores, under the depth and width that these scores are read at."""
        return {
            _as_read(item.setting, item.setting.depth): item.calibration
            for item in self.settings
            if item.calibration is not None and not item.setting.cascade
        }

    def fusion_weight(self) -> float:
        """Return the weight of the first stage's scores. Raises ValueError if the plan has no weight."""
        if self.fusion is None:
            raise ValueError(
                f"fusion='auto': the plan of {self.data} has no fusion weight. An evaluation with --fusion "
                "--write_plan chooses one."
            )
        return self.fusion

    def check_conditions(self, scored_with: Mapping[str, Any]) -> None:
        """Raise ValueError if the conditions of scores differ from those that the calibrations were fitted in."""
        others = {
            name: (value, scored_with.get(name))
            for name, value in self.scored_with.items()
            if value != scored_with.get(name)
        }
        if others:
            said = ", ".join(f"{name} {measured!r}, and not {given!r}" for name, (measured, given) in others.items())
            raise ValueError(f"normalize='calibrated': the plan of {self.data} was measured with {said}.")

    def write(self, path: Path) -> None:
        """Write the plan as a JSON file. The file is replaced in one step."""
        settings = [asdict(item) | {"calibration": to_json(item.calibration)} for item in self.settings]
        stored = asdict(self) | {"settings": settings}
        write_text(path, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


def _as_read(setting: Setting, layer: int) -> Setting:
    """Return the part of a setting that a score at an exit depends on. Only compress layers before the exit count."""
    before = tuple(after for after in setting.compress_layers if after < layer)
    width = before or setting.compress_layers, setting.compress_ratio
    return Setting((layer,), *width, store_layer=setting.store_layer)


def _best_within(budget: float, settings: Sequence[Measurement], among: str) -> Setting:
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget}, but it is a share of the full network's operations, in (0, 1].")
    cheapest = min(settings, key=lambda item: item.flops_share)
    if cheapest.flops_share > budget:
        raise ValueError(
            f"budget={budget}: the cheapest {among}, {cheapest.setting}, costs {cheapest.flops_share:.4g} of the full "
            "network's operations."
        )
    within = [item for item in settings if item.flops_share <= budget]
    return max(within, key=lambda item: (item.ndcg_share, -item.flops_share)).setting


def _cheapest_reaching(quality: float, settings: Sequence[Measurement], among: str) -> Setting:
    if not quality > 0:
        raise ValueError(f"quality={quality}, but it is a share of the full network's nDCG@10, above 0.")
    best = max(settings, key=lambda item: item.ndcg_share)
    if best.ndcg_share < quality:
        raise ValueError(
            f"quality={quality}: the best {among}, {best.setting}, reaches {best.ndcg_share:.4g} of the full network's "
            "nDCG@10."
        )
    reaching = [item for item in settings if item.ndcg_share >= quality]
    return min(reaching, key=lambda item: (item.flops_share, -item.ndcg_share)).setting


def adapter_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the names of adapters that a plan stores. Paths are left out, so that a model can be moved."""
    return tuple(Path(path).name for path in paths)


def load_plan(
    model: str,
    config: CostWiseConfig,
    adapters: Sequence[str] = (),
    weights: Callable[[], str] | None = None,
    **hub: Any,
) -> Plan:
    """Load the plan beside a model.

    Args:
        model: a local directory or a name, as in `inspect_checkpoint`.
        config: the model's configuration.
        adapters: paths of the adapters that are merged into the model or attached to it.
        weights: returns the fingerprint of the weights; None computes it.
        hub: `cache_dir`, `token`, … as in transformers.

    Raises:
        FileNotFoundError: if there is no plan; the error names the command that writes one.
        ValueError: if the file is no plan, is the plan of another model, or was measured with other weights.
    """
    # A GGUF file has no plan: it is neither a directory nor a name on the hub.
    located = locate(model)
    is_file = Path(located).expanduser().is_file()
    path = None if is_file else find_file(located, PLAN_NAME, **hub)
    if path is None:
        raise FileNotFoundError(
            f"{model} has no {PLAN_NAME}, which budget, quality, fusion='auto' and normalize='calibrated' need. This "
            f"measures settings on a collection in BEIR layout and writes it, with --calibrate also the calibrations, "
            f"with --fusion also the fusion weight: {COMMAND.format(model)}"
        )
    try:
        plan = _from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no plan ({error!r}). Write it anew: {COMMAND.format(model)}") from error
    try:
        plan.check(config, adapters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is the plan of another model: {error}. {COMMAND.format(model)} makes one.") from error
    if plan.weights is None:
        warnings.warn(
            f"{path} names no weights: an older version wrote it. It is not known whether it was measured with the "
            f"weights of {model}. {COMMAND.format(model)} writes a plan that names them.",
            UserWarning,
            stacklevel=2,
        )
        return plan
    found = weights_fingerprint(inspect_checkpoint(model, **hub), adapters, **hub) if weights is None else weights()
    if found != plan.weights:
        raise ValueError(
            f"{path} was measured with other weights, whose fingerprint is {plan.weights:.12}…. The fingerprint of "
            f"{model} is {found:.12}…. {COMMAND.format(model)} measures these weights."
        )
    return plan


def _from_json(stored: Mapping[str, Any]) -> Plan:
    settings = [
        Measurement(
            **item | {"setting": Setting(**item["setting"]), "calibration": from_json(item.get("calibration"))},
        )
        for item in stored["settings"]
    ]
    lists = {"exit_layers": tuple(stored["exit_layers"]), "adapters": tuple(stored["adapters"])}
    return Plan(**{**stored, **lists, "settings": tuple(settings)})
