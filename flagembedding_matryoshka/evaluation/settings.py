"""Which settings are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import Setting


def full_network(config: CostWiseConfig) -> Setting:
    """The deepest exit at full width, with which the others are compared."""
    return Setting((config.exit_layers[-1],))


def by_width(settings: Iterable[Setting]) -> list[Setting]:
    """Each once, and those of a width beside each other, so that one pass scores them."""
    return sorted(dict.fromkeys(settings), key=lambda setting: (setting.compress_ratio, setting.compress_layers))


def grid(
    config: CostWiseConfig,
    cutoff_layers: Sequence[int] | None = None,
    compress_layers: Sequence[int] = (),
    compress_ratios: Iterable[int] = (1,),
    cascades: Iterable[Mapping[int, float]] = (),
) -> list[Setting]:
    """Every cutoff layer, and every cascade, at every ratio.

    The full network is among them, and so are the other exits at full width and each exit at which a cascade drops:
    the same passes score them. Depths at which a ratio has not compressed anything yet are left out.

    Args:
        cutoff_layers: None is all exits. The deepest is where cascades end.
        cascades: {exit: share of all candidates that goes deeper}.

    Raises:
        ValueError: if the model has no such exit or layer, or a ratio has no layer to apply it at.
    """
    cutoffs = config.exit_layers if cutoff_layers is None else list(cutoff_layers)
    stages = [tuple(sorted(cascade.items())) for cascade in cascades]
    exits = {*cutoffs, *(layer for stage in stages for layer, _ in stage)}
    settings = []
    for ratio in sorted({1, *compress_ratios}):
        width = Setting.resolve(config, cutoffs, compress_layers, ratio)
        after = width.compress_layers if ratio > 1 else ()
        first = min(after, default=0)
        plain = exits if ratio > 1 else exits | {full_network(config).depth}
        settings += [Setting((depth,), after, ratio) for depth in sorted(plain) if depth > first]
        settings += [Setting((width.depth,), after, ratio, stage) for stage in stages if width.depth > first]
    for setting in settings:
        setting.check(config)
    return list(dict.fromkeys(settings))
