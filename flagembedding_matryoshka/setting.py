"""Depth, width, cascade and store layer of one pass."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from numbers import Real
from typing import Any, Protocol

COMPRESS_RATIOS = (1, 2, 4, 8)
Layers = int | Iterable[int] | None


class Exits(Protocol):
    """The fields of a model, or of its configuration, that a setting is checked with."""

    num_hidden_layers: int

    @property
    def exit_layers(self) -> list[int]: ...


def as_layer_tuple(name: str, layers: Layers) -> tuple[int, ...] | None:
    """Return `layers` as a tuple; None stays None.

    Raises:
        TypeError: if a value is not an int, or `layers` is a dict or a set.
    """
    if layers is None:
        return None
    if isinstance(layers, Mapping | Set):
        raise TypeError(f"{name} must be an int or a list of ints, got the {type(layers).__name__} {layers!r}.")
    values = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int or a list of ints, got {value!r} in {layers!r}.")
    return tuple(map(operator.index, values))


def resolve_alias(compress_layer: Layers, compress_layers: Layers) -> Layers:
    """Return the compress layers of a call; `compress_layer` is the reference's name of the argument.

    Raises:
        TypeError: as `as_layer_tuple`, if both are given.
        ValueError: if both are given and differ.
    """
    if compress_layer is None or compress_layers is None:
        return compress_layers if compress_layer is None else compress_layer
    if as_layer_tuple("compress_layer", compress_layer) != as_layer_tuple("compress_layers", compress_layers):
        raise ValueError(
            f"compress_layer {compress_layer} and compress_layers {compress_layers} contradict: they are two names of "
            "one argument. Give one."
        )
    return compress_layers


def share_of(share: float, candidates: int) -> int:
    """Return share · candidates, rounded up. The share is exact in decimals, so that 0.07 of 100 is 7.

    >>> share_of(0.07, 100), math.ceil(0.07 * 100)
    (7, 8)
    """
    return math.ceil(Fraction(str(float(share))) * candidates)


def as_stages(cascade: Any) -> tuple[tuple[int, float], ...]:
    """Return (exit, share) of each stage of a cascade, the shallowest first.

    Args:
        cascade: {exit: share}, or such pairs.

    Raises:
        TypeError: if an exit is not an int, or a share not a number.
        ValueError: if an exit is named twice.
    """
    try:
        stages = [(layer, share) for layer, share in (cascade.items() if isinstance(cascade, Mapping) else cascade)]
    except (TypeError, ValueError) as error:
        raise TypeError(f"cascade must be {{exit: share}}, got {cascade!r}.") from error
    exits = as_layer_tuple("the exits of a cascade", [layer for layer, _ in stages]) or ()
    for _, share in stages:
        if not isinstance(share, Real) or isinstance(share, bool):
            raise TypeError(f"the shares of a cascade must be numbers, got {share!r} in {cascade!r}.")
    if len(set(exits)) < len(exits):
        raise ValueError(f"cascade names an exit twice: {cascade!r}.")
    return tuple(sorted(zip(exits, (share for _, share in stages), strict=True)))


@dataclass(frozen=True)
class Setting:
    """Depth, width, cascade and store layer of one pass. A layer is the number of decoder layers that have run.

    Attributes:
        cutoff_layers: exits to score at, in the order of the returned scores.
        compress_layers: layers after which the passage is compressed, ascending, each once.
        compress_ratio: number of consecutive passage tokens that become one: 1 (off), 2, 4 or 8.
        cascade: (exit, share of all candidates that go deeper) of each stage, the shallowest first; empty without a
            cascade.
        store_layer: number of layers in which passages run apart from their queries, so that the states after them can
            be stored for any query; 0 is none. All exits lie above it. A ratio without `compress_layers` then
            compresses after this layer.

    An int stands for a list of one, and a dict for the pairs of a cascade.

    Raises:
        TypeError: if a layer is not an int, or a share not a number.
        ValueError: if there is no cutoff layer or no such ratio, a ratio has no layer to apply it at, an exit is named
            twice, a share is not in (0, 1] or exceeds the one before it, `store_layer` is negative, an exit does not
            lie above it, or passages are compressed below it.
    """

    cutoff_layers: tuple[int, ...]
    compress_layers: tuple[int, ...] = ()
    compress_ratio: int = 1
    cascade: tuple[tuple[int, float], ...] = ()
    store_layer: int = 0

    def __post_init__(self) -> None:
        ratio = self.compress_ratio
        if ratio not in COMPRESS_RATIOS or isinstance(ratio, bool):
            raise ValueError(
                f"compress_ratio is {ratio!r}, but must be one of {list(COMPRESS_RATIOS)}: the model is trained with "
                "these, so that ratios nest and one adapter per ratio can be fitted."
            )
        cutoffs = as_layer_tuple("cutoff_layers", self.cutoff_layers) or ()
        after = tuple(sorted(set(as_layer_tuple("compress_layers", self.compress_layers) or ())))
        cascade = as_stages(self.cascade)
        store = self.store_layer
        if isinstance(store, bool) or not hasattr(store, "__index__"):
            raise TypeError(f"store_layer must be an int, got {store!r}.")
        store = operator.index(store)
        if ratio > 1 and not after and store:
            after = (store,)
        names = ("cutoff_layers", "compress_layers", "compress_ratio", "cascade", "store_layer")
        for name, value in zip(names, (cutoffs, after, int(ratio), cascade, store), strict=True):
            object.__setattr__(self, name, value)

        if not cutoffs:
            raise ValueError("cutoff_layers is empty.")
        if store < 0:
            raise ValueError(f"store_layer is {store}, but must be a number of layers, or 0 for none.")
        for name, layers in (("cutoff_layers", cutoffs), ("cascade", dict(cascade))):
            if store and (below := [layer for layer in layers if layer <= store]):
                raise ValueError(
                    f"{name} {below} do not lie above store_layer={store}: up to it, a passage does not know its query."
                )
        if ratio > 1 and (below := [layer for layer in after if layer < store]):
            raise ValueError(
                f"compress_layers {below} lie below store_layer={store}: stored passages are compressed after layer "
                f"{store} first."
            )
        if ratio > 1 and not after:
            raise ValueError(f"compress_ratio={ratio} needs compress_layers that say where to compress.")
        before = 1.0
        for layer, share in cascade:
            if not 0 < share <= before:
                raise ValueError(
                    f"cascade keeps {share} of all candidates after layer {layer}: shares lie in (0, 1] and do not "
                    f"rise; the one before is {before}."
                )
            before = share

    @cached_property
    def depth(self) -> int:
        """Number of decoder layers that run: the deepest cutoff layer."""
        return max(self.cutoff_layers)

    @property
    def width(self) -> tuple[int, tuple[int, ...], int]:
        """Ratio, compress layers and store layer. Exits of settings with the same width can be read in one pass."""
        return self.compress_ratio, self.compress_layers, self.store_layer

    def compresses_after(self, layer: int) -> bool:
        """Return whether the passage is compressed after `layer`. After the last exit nothing is compressed."""
        return self.compress_ratio > 1 and layer < self.depth and layer in self.compress_layers

    def readable(self, exits: Iterable[int]) -> list[int]:
        """Return the exits where the scores of a pass can be read: those above the store layer, up to the depth."""
        return [layer for layer in exits if self.store_layer < layer <= self.depth]

    def kept(self, candidates: int) -> int:
        """Return the number of candidates that reach the end of the cascade, at least one."""
        return share_of(self.cascade[-1][1], candidates) if self.cascade else candidates

    @classmethod
    def resolve(
        cls,
        config: Exits,
        cutoff_layers: Layers = None,
        compress_layers: Layers = None,
        compress_ratio: int | None = None,
        cascade: Mapping[int, float] | None = None,
        store_layer: int | None = None,
    ) -> Setting:
        """Make a setting and check it against the exits and layers of a model. None is the default of an argument.

        Args:
            cutoff_layers: exits to score at; None is the deepest exit.

        Raises:
            TypeError, ValueError: as `Setting`, and ValueError if an exit or layer does not exist.
        """
        exits = config.exit_layers
        cutoffs = as_layer_tuple("cutoff_layers", cutoff_layers)
        if cutoffs == ():
            raise ValueError(f"cutoff_layers is empty. This model's exits are {exits}.")
        setting = cls(
            exits[-1:] if cutoffs is None else cutoffs,  # type: ignore[arg-type]
            () if compress_layers is None else compress_layers,  # type: ignore[arg-type]
            1 if compress_ratio is None else compress_ratio,
            () if cascade is None else cascade,  # type: ignore[arg-type]
            0 if store_layer is None else store_layer,
        )
        setting.check(config)
        return setting

    def check(self, config: Exits) -> None:
        """Raise ValueError unless a model of this configuration can run the setting."""
        exits = config.exit_layers
        if unknown := [layer for layer in self.cutoff_layers if layer not in exits]:
            raise ValueError(f"cutoff_layers {unknown} have no head. This model's exits are {exits}.")
        if outside := [layer for layer in self.compress_layers if not 1 <= layer <= config.num_hidden_layers]:
            raise ValueError(
                f"compress_layers {outside} do not exist. A compress layer is the number of decoder layers that have "
                f"run, from 1 to {config.num_hidden_layers}."
            )
        possible = [layer for layer in exits if layer < max(self.cutoff_layers)]
        for layer, _ in self.cascade:
            if layer not in possible:
                raise ValueError(f"cascade drops candidates after layer {layer}, but must do so at one of {possible}.")

    @property
    def arguments(self) -> dict[str, Any]:
        """Depth, width and store layer as keyword arguments of `MatryoshkaReranker.compute_score`."""
        return {
            "cutoff_layers": list(self.cutoff_layers),
            "compress_layers": list(self.compress_layers),
            "compress_ratio": self.compress_ratio,
            "store_layer": self.store_layer,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the arguments of an equal setting as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        stages = "".join(f"{layer}:{share:g} → " for layer, share in self.cascade)
        after = ", ".join(map(str, self.compress_layers))
        width = f", ratio {self.compress_ratio} after {after}" if self.compress_ratio > 1 else ""
        store = f", passages stored after {self.store_layer}" if self.store_layer else ""
        return f"{stages}{', '.join(map(str, self.cutoff_layers))} layers{width}{store}"
