"""Fusion with the first stage: the weight is chosen on one half of the queries and measured on the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from flagembedding_matryoshka.evaluation.baselines import Baseline
from flagembedding_matryoshka.evaluation.candidates import Candidates, Halves, take
from flagembedding_matryoshka.evaluation.measure import TokenizedLists, measure_fused_settings
from flagembedding_matryoshka.evaluation.results import Result, Store
from flagembedding_matryoshka.evaluation.runs import (
    QUALITY,
    Run,
    first_stage_run,
    fuse_runs,
    mean,
    per_query,
    quality_of,
)
from flagembedding_matryoshka.evaluation.significance import holm, mean_interval, paired_interval, paired_p_value
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.setting import Setting

logger = logging.getLogger(__name__)

WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0)
"""Weights to try by default."""
FIRST_STAGE = "first stage"
"""The first stage's name among the scorers of an order."""


@dataclass(frozen=True)
class WeightChoice:
    """The weights with the best ranking on the choosing half, one for each scorer but the first.

    Attributes:
        weights: the best weights; of equally good ones the weights with the smallest sum.
        qualities: nDCG@10 on the choosing half for each combination of weights that was tried.
    """

    weights: tuple[float, ...]
    qualities: Mapping[tuple[float, ...], float]


@dataclass(frozen=True)
class Difference:
    """A change of nDCG@10 on the held-out half.

    Attributes:
        change: mean over queries.
        interval: 95 % confidence interval of a paired bootstrap; None for a single query.
        p_value: p-value of a paired randomisation test, after Holm's correction for the tests of its family.
    """

    change: float
    interval: tuple[float, float] | None
    p_value: float


@dataclass(frozen=True)
class Level:
    """nDCG@10 on the held-out half.

    Attributes:
        mean: mean over queries.
        interval: 95 % confidence interval of a bootstrap; None for a single query.
    """

    mean: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Level:
        """Return the level of values, one for each query."""
        return cls(mean(values), mean_interval(values))


@dataclass(frozen=True)
class FusionComparison:
    """A setting with and without fusion.

    Attributes:
        result: cost and quality with fusion, on all queries.
        plain, fused: levels without and with fusion.
        against_plain: the fused order against the setting's plain order.
        against_first_stage: the fused order against the first stage's order.
    """

    result: Result
    plain: Level
    fused: Level
    against_plain: Difference
    against_first_stage: Difference

    def as_json(self) -> dict[str, Any]:
        """Return JSON values, without the values of single queries."""
        levels = {name: asdict(getattr(self, name)) for name in ("plain", "fused")}
        return {
            **asdict(self.result.setting),
            **{measure: mean(values) for measure, values in self.result.per_query.items()},
            "flops_per_pair": self.result.flops_per_pair,
            "pairs_per_second": self.result.pairs_per_second,
            "held_out": levels,
            "against_plain": asdict(self.against_plain),
            "against_first_stage": asdict(self.against_first_stage),
        }


@dataclass(frozen=True)
class Order:
    """An order by one scorer, or by the fused scores of several scorers.

    Attributes:
        baseline: quality on all queries, and cost.
        weights: (name, weight) of each scorer but the first, whose weight is 1.
        is_reference: True for the full network fused with the first stage.
    """

    baseline: Baseline
    weights: Sequence[tuple[str, float]] = ()
    is_reference: bool = False


@dataclass(frozen=True)
class OrderComparison:
    """An order against the reference, the full network fused with the first stage.

    Attributes:
        held_out: the order's level.
        change: the order against the reference; None for the reference itself.
    """

    order: Order
    held_out: Level
    change: Difference | None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values, without the values of single queries."""
        baseline = self.order.baseline
        return {
            "name": baseline.name,
            "weights": [{"scorer": scorer, "weight": weight} for scorer, weight in self.order.weights],
            **{measure: mean(values) for measure, values in baseline.per_query.items()},
            "flops_per_pair": baseline.flops_per_pair,
            "pairs_per_second": baseline.pairs_per_second,
            "held_out": asdict(self.held_out),
            "change": None if self.change is None else asdict(self.change),
        }


@dataclass(frozen=True)
class FusionResult:
    """Quality of fusion with a first stage.

    Attributes:
        choice: the weight, chosen by the full network's scores.
        queries, held_out_queries: number of queries in the choosing and in the held-out half.
        first_stage: the level of the first stage alone.
        full: the deepest exit at full width.
        settings: each measured setting, fused at this weight. For Holm's correction the two tests of the full network
            are one family, and the tests of all other settings another.
        orders: the first stage, bi-encoders and the re-ranker, alone and fused, a third family; empty without a
            bi-encoder.
    """

    choice: WeightChoice
    queries: int
    held_out_queries: int
    first_stage: Level
    full: Setting
    settings: Sequence[FusionComparison]
    orders: Sequence[OrderComparison] = ()

    @property
    def weight(self) -> float:
        """The weight of the first stage."""
        return self.choice.weights[0]

    def summary(self) -> str:
        """Return the choice and the full network's change by it, as a sentence."""
        (item,) = (item for item in self.settings if item.result.setting == self.full)
        return (
            f"fusion weight {self.weight:g}, chosen by {self.queries} queries; on the {self.held_out_queries} others "
            f"{QUALITY} of {self.full}: {item.plain.mean:.4f} plain → {item.fused.mean:.4f} fused, "
            f"{_describe(item.against_plain)}; against the first stage alone ({self.first_stage.mean:.4f}) "
            f"{_describe(item.against_first_stage)}."
        )

    def as_json(self) -> dict[str, Any]:
        """Return JSON values, without the values of single queries."""
        return {
            "weight": self.weight,
            "queries": self.queries,
            "held_out_queries": self.held_out_queries,
            "weights": [{"weight": weight, QUALITY: quality} for (weight,), quality in self.choice.qualities.items()],
            "first_stage": asdict(self.first_stage),
            "settings": [item.as_json() for item in self.settings],
            "orders": [item.as_json() for item in self.orders],
        }


def measure_fusion(
    reranker: MatryoshkaReranker,
    candidates: Candidates,
    results: Sequence[Result],
    baselines: Sequence[Baseline],
    full: Setting,
    store: Store,
    weights: Sequence[float],
    timed_pairs: int,
    recall_at: int,
    tokenized: Callable[[], TokenizedLists] | None = None,
) -> FusionResult:
    """Choose the weight of the first stage by the full network's scores, and fuse every setting at this weight.

    Args:
        reranker: the re-ranker.
        candidates: the candidates.
        results, store: results of `measure_settings`, and its store.
        baselines: the first one is the candidates' own order.
        full: the deepest exit at full width.
        weights: weights to try; a single weight is used without a choice.
        timed_pairs, recall_at, tokenized: as in `measure_settings`.

    Raises:
        ValueError: as `first_stage_run`.
    """
    scores = store.run(full)
    choice = choose_weights(candidates, scores, [first_stage_run(candidates)], weights, Halves.of(candidates.passages))
    (weight,) = choice.weights
    if len(choice.qualities) > 1 and weight == max(weights):
        logger.warning("fusion weight %g is the largest weight tried: give --fusion larger weights too", weight)
    fused = measure_fused_settings(reranker, candidates, results, store, weight, timed_pairs, recall_at, tokenized)
    (reference,) = (result for result in fused if result.setting == full)
    orders = fuse_orders(candidates, scores, reference, weight, baselines, weights, recall_at)
    return compare_fusion(candidates, choice, results, fused, full, baselines[0], orders)


def choose_weights(
    candidates: Candidates, run: Run, others: Sequence[Run], weights: Sequence[float], halves: Halves
) -> WeightChoice:
    """Try all combinations of weights on the choosing half. Scores and judgements of the other half are not read.

    Args:
        candidates: the candidates.
        run: scores with weight 1.
        others: scores to add to `run`.
        weights: weights to try for each of `others`.
        halves: the halves of the queries.
    """
    queries = take(list(candidates.passages), halves.choosing)
    qualities = {}
    for tried in sorted(product(sorted(set(weights)), repeat=len(others)), key=sum):
        fused = fuse_runs(candidates, run, list(zip(others, tried, strict=True)), queries)
        qualities[tried] = mean(quality_of(candidates, fused, queries))
    return WeightChoice(max(qualities, key=qualities.__getitem__), qualities)


def compare_fusion(
    candidates: Candidates,
    choice: WeightChoice,
    plain: Sequence[Result],
    fused: Sequence[Result],
    full: Setting,
    first_stage: Baseline,
    orders: Sequence[Order] = (),
) -> FusionResult:
    """Compare fused orders on the held-out half.

    Args:
        choice: the first stage's weight.
        plain, fused: results of the same settings, without and with fusion.
        full: the deepest exit at full width.
        first_stage: the candidates' own order.
        orders: as `fuse_orders` returns them.
    """
    halves = Halves.of(candidates.passages)

    def held_out(item: Result | Baseline) -> list[float]:
        return take(item.per_query[QUALITY], halves.held_out)

    alone = held_out(first_stage)
    found: dict[Setting, list[Difference]] = {}
    for is_full in (True, False):
        family = [pair for pair in zip(plain, fused, strict=True) if (pair[1].setting == full) is is_full]
        tests = [(held_out(after), other) for before, after in family for other in (held_out(before), alone)]
        tested = _differences(tests)
        found |= {after.setting: tested[2 * index : 2 * index + 2] for index, (_, after) in enumerate(family)}
    settings = [
        FusionComparison(after, Level.of(held_out(before)), Level.of(held_out(after)), *found[after.setting])
        for before, after in zip(plain, fused, strict=True)
    ]
    (reference,) = (held_out(result) for result in fused if result.setting == full)
    others = [order for order in orders if not order.is_reference]
    against = iter(_differences([(held_out(order.baseline), reference) for order in others]))
    order_comparisons = [
        OrderComparison(order, Level.of(held_out(order.baseline)), None if order.is_reference else next(against))
        for order in orders
    ]
    sizes = len(halves.choosing), len(halves.held_out)
    return FusionResult(choice, *sizes, Level.of(alone), full, settings, order_comparisons)


def fuse_orders(
    candidates: Candidates,
    scores: Run,
    full: Result,
    weight: float,
    baselines: Sequence[Baseline],
    weights: Sequence[float],
    recall_at: int,
) -> list[Order]:
    """Return the orders of the first stage, the bi-encoders and the full network, alone and fused.

    The choosing half chooses the weights of each order separately.

    Args:
        scores: the full network's scores.
        full: the full network's result, fused with the first stage.
        weight: weight of the first stage in `full`.
        baselines: the first one is the candidates' own order.
        weights: weights to try.

    Returns:
        An empty list if no baseline is a bi-encoder.
    """
    encoders = [baseline for baseline in baselines if baseline.run is not None]
    if not encoders:
        return []
    halves = Halves.of(candidates.passages)

    def fuse(name: str, run: Run, others: Sequence[tuple[str, Run]], cost: Baseline) -> Order:
        """Fuse `run` with others.

        Args:
            cost: an order of the same cost.
        """
        names, runs = zip(*others, strict=True)
        chosen = choose_weights(candidates, run, runs, weights, halves).weights
        fused = fuse_runs(candidates, run, list(zip(runs, chosen, strict=True)))
        quality = per_query(candidates, fused, recall_at)
        named = replace(cost, name=" + ".join([name, *names]), per_query=quality, run=fused)
        return Order(named, list(zip(names, chosen, strict=True)))

    name, first = str(full.setting), (FIRST_STAGE, first_stage_run(candidates))
    reference = Baseline(f"{name} + {FIRST_STAGE}", full.per_query, full.flops_per_pair, full.pairs_per_second)
    orders = [Order(baselines[0])]
    for encoder in encoders:
        assert encoder.run is not None
        orders += [Order(encoder), fuse(encoder.name, encoder.run, [first], encoder)]
    orders.append(Order(reference, [(FIRST_STAGE, weight)], is_reference=True))
    for encoder in encoders:
        assert encoder.run is not None
        both = _add_cost(reference, encoder)
        orders.append(fuse(name, scores, [first, (encoder.name, encoder.run)], both))
    return orders


def _add_cost(one: Baseline, other: Baseline) -> Baseline:
    """Return `one` at the cost of running both, one after the other."""
    assert one.flops_per_pair and other.flops_per_pair and one.pairs_per_second and other.pairs_per_second
    speed = 1 / (1 / one.pairs_per_second + 1 / other.pairs_per_second)
    return replace(one, flops_per_pair=one.flops_per_pair + other.flops_per_pair, pairs_per_second=speed)


def _differences(tests: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[Difference]:
    """Compare each pair of value lists; all pairs are one family of tests.

    Args:
        tests: (values, reference) with one value for each query.
    """
    p_values = holm([paired_p_value(values, reference) for values, reference in tests])
    return [
        Difference(mean(values) - mean(reference), paired_interval(values, reference), p_value)
        for (values, reference), p_value in zip(tests, p_values, strict=True)
    ]


def _describe(difference: Difference) -> str:
    """Describe a change with its interval and p-value."""
    interval = "" if difference.interval is None else "95 % {:+.4f} to {:+.4f}, ".format(*difference.interval)
    return f"{difference.change:+.4f} ({interval}p = {difference.p_value:.3f})"
