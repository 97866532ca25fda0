"""Which setting to run within a budget, or for a wanted quality: a choice among those that an evaluation measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.shipped import locate
from flagembedding_matryoshka.setting import Setting

PLAN_NAME = "matryoshka_plan.json"
COMMAND = "python -m flagembedding_matryoshka.evaluation --model {} --data DIR --write_plan"


@dataclass(frozen=True)
class Measured:
    """A setting with what it costs and gives, as shares of the full network: deepest exit, full width, no cascade.

    Raises:
        TypeError: if a share is not a number.
        ValueError: if it is not finite, the cost is not above 0, or the quality is negative.
    """

    setting: Setting
    flops_share: float
    ndcg_share: float

    def __post_init__(self) -> None:
        if not 0 < self.flops_share < math.inf or not 0 <= self.ndcg_share < math.inf:
            raise ValueError(f"{self.setting} has flops_share {self.flops_share} and ndcg_share {self.ndcg_share}")


@dataclass(frozen=True)
class Plan:
    """What an evaluation measured.

    Attributes:
        exit_layers: the model's exits, all of them.
        adapters: names of the adapters that were merged into it or attached beside its own, in order.
        data, queries, candidates: on what it was measured: the collection, how many queries, whose lists.
        settings: everything measured.
    """

    exit_layers: tuple[int, ...]
    adapters: tuple[str, ...]
    data: str
    queries: int
    candidates: str
    settings: tuple[Measured, ...]

    def choose(self, budget: float | None = None, quality: float | None = None, cascades: bool = True) -> Setting:
        """The best setting within `budget`, or the cheapest that reaches `quality`; give one of them.

        Args:
            budget: share of the full network's floating-point operations, in (0, 1].
            quality: share of the full network's nDCG@10, above 0.
            cascades: whether one may be chosen that drops candidates on the way.

        Raises:
            ValueError: if both or neither are given, one is out of its range, or no setting fits; the error names the
                one that comes nearest.
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
        """Raise ValueError unless a model of this configuration, with these adapters, may be what was measured."""
        if list(self.exit_layers) != config.exit_layers:
            raise ValueError(f"it measured exits {list(self.exit_layers)}, and this model has {config.exit_layers}")
        names = adapter_names(adapters)
        if self.adapters != names:
            raise ValueError(f"it measured the model with the adapters {list(self.adapters)}, and not {list(names)}")
        for item in self.settings:
            item.setting.check(config)

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def _best_within(budget: float, settings: Sequence[Measured], among: str) -> Setting:
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


def _cheapest_reaching(quality: float, settings: Sequence[Measured], among: str) -> Setting:
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
    """What a plan keeps of adapters' paths, so that a model can move."""
    return tuple(Path(path).name for path in paths)


def load_plan(model: str, config: CostWiseConfig, adapters: Sequence[str] = (), **hub: Any) -> Plan:
    """The plan beside a model, a local directory or a name as `inspect_checkpoint` takes it.

    Args:
        config: the model's.
        adapters: paths of the adapters that are merged into it or attached.
        hub: `cache_dir`, `token`, … as in transformers.

    Raises:
        FileNotFoundError: if there is none, with the command that writes it.
        ValueError: if the file is no plan, or another model's.
    """
    # A GGUF file has none: it is no directory, and no name on the hub.
    located = locate(model)
    is_file = Path(located).expanduser().is_file()
    path = None if is_file else cached_file(located, PLAN_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        raise FileNotFoundError(
            f"{model} has no {PLAN_NAME}: budget and quality choose among settings that were measured. This measures "
            f"them on a collection in BEIR layout and writes it: {COMMAND.format(model)}"
        )
    try:
        plan = _from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no plan ({error!r}). Write it anew: {COMMAND.format(model)}") from error
    try:
        plan.check(config, adapters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is the plan of another model: {error}. {COMMAND.format(model)} makes one.") from error
    return plan


def _from_json(stored: Mapping[str, Any]) -> Plan:
    settings = [
        Measured(Setting(**item["setting"]), item["flops_share"], item["ndcg_share"]) for item in stored["settings"]
    ]
    lists = {"exit_layers": tuple(stored["exit_layers"]), "adapters": tuple(stored["adapters"])}
    return Plan(**{**stored, **lists, "settings": tuple(settings)})
