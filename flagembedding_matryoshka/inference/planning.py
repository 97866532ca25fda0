"""A re-ranker that asks the plan beside its model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

from flagembedding_matryoshka.inference.fusion import as_fusion
from flagembedding_matryoshka.inference.hosting import HostedReranker
from flagembedding_matryoshka.inference.normalizing import Normalizer, normalizer, scored_with
from flagembedding_matryoshka.inference.options import ScoringOptions, refuse_beside_plan
from flagembedding_matryoshka.inference.plan import Plan
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.templates import Template


class PlannedReranker(HostedReranker):
    """Takes depth, width and cascade, and what scores mean, from a plan where it is told to.

    Attributes:
        planned: what `rank` runs by `budget` or `quality`; None without them.
        fusion: default weight of the first stage's scores in rankings that have such scores; None is no default.
        quantization: the format of the weights, if they are quantized.
        dtype: the format that weights are loaded in, such as "float32".
        words: the template.
        temperature: the template's: scores are divided by it before the sigmoid.
    """

    planned: Setting | None = None
    fusion: float | None
    quantization: str | None
    dtype: str
    words: Template
    temperature: float
    _load_plan: Callable[[], Plan]

    @cached_property
    def plan(self) -> Plan:
        """What an evaluation measured of this model; FileNotFoundError or ValueError if there is none, or another's."""
        return self._load_plan()

    def _follow_plan(self, budget: float | None, quality: float | None) -> None:
        """Make what the plan chooses the defaults; one of both may be given, or neither."""
        if budget is None and quality is None:
            return
        refuse_beside_plan(self)
        self.planned = self.plan.choose(budget, quality)
        for name, value in self.plan.choose(budget, quality, cascades=False).arguments.items():
            setattr(self, name, value)

    def _choose_fusion(self, fusion: Any) -> None:
        """Set the default weight: the given one, or for None the weight of the plan that `budget` or `quality` use."""
        follows = fusion is None and self.planned is not None
        self.fusion = self.plan.fusion if follows else as_fusion(fusion, lambda: self.plan.fusion_weight())

    def _normalizer(self, options: ScoringOptions, setting: Setting, exits: Collection[int] = ()) -> Normalizer | None:
        return normalizer(options, setting, lambda: self.plan, self.scored_with(options), self.temperature, exits)

    def scored_with(self, options: ScoringOptions) -> dict[str, Any]:
        """What scores of a call depend on beside weights, depth, width and lengths; a plan notes it."""
        return scored_with(options, self.quantization, self.dtype, self.words)
