"""What a model can do (`CostWiseConfig`) and what one pass through it runs (`SubNetwork`)."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal

COMPRESS_RATIOS = (1, 2, 4, 8)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Config
    from typing_extensions import Self
else:  # a mixin: the configuration of the backbone comes behind it
    _Config = object


@dataclass(kw_only=True)
class CostWiseConfig(_Config):
    """What a decoder's configuration has more when its relevance score can be read at several depths.

    Args:
        layer_wise: one scoring head per exit; without it the checkpoint is a plain causal language model.
        start_layer: the shallowest exit, counted in decoder layers that have run (1 to `num_hidden_layers`).
        layer_sep: distance between neighbouring exits.
        exits: the exits one by one, ascending, where they are not evenly spaced; `start_layer` and `layer_sep` then say
            nothing.
        template: what stands around query and passage, by name or as
            [`Template.to_json`][flagembedding_matryoshka.text.templates.Template] says it.
        head_token_id: row of a raw checkpoint's `lm_head` that every head starts from, or two, of which the second is
            subtracted, see [`~flagembedding_matryoshka.text.pairs.find_head_token_ids`]; None starts the heads at
            random.
        head_scale: what that row is multiplied by; a small one starts training at the loss of chance.
        compress_weights: what weighs passage tokens that are merged: the last token's "attention" to them (CostWise
            Mistral), or nothing, so that all are "equal" (FlagEmbedding's lightweight Gemma-2).
        raw_peft: adapters that were merged into the base before an adapter beside this configuration was trained.
        compensation: what that adapter makes up for, {"axis": "layer" or "token", "compress_ratio": …}; None for one
            of the first stage (paper, section on factorized compensation).
    """

    made_from: ClassVar[tuple[str, ...]]
    """The `model_type` of checkpoints that have no heads yet, and of published ones that mean the same decoder."""

    layer_wise: bool = False
    start_layer: int = 4
    layer_sep: int = 1
    exits: list[int] | tuple[int, ...] | None = None
    template: str | dict[str, Any] = "cost_wise"
    head_token_id: int | list[int] | tuple[int, ...] | None = None
    head_scale: float = 1.0
    compress_weights: Literal["attention", "equal"] = "attention"
    raw_peft: list[str] | tuple[str, ...] = ()
    compensation: dict[str, int | str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Published checkpoints point at remote code here; ours is the only code that runs.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    @property
    def exit_layers(self) -> list[int]:
        """Depths at which a score can be read, ascending: `exits`, or start_layer, start_layer + layer_sep, …

        Raises:
            ValueError: if they name no exit, or layers that do not exist.
        """
        if self.exits is not None:
            exits = list(self.exits)
            if not exits or exits != sorted(set(exits)) or exits[0] < 1 or exits[-1] > self.num_hidden_layers:
                raise ValueError(
                    f"exits {exits} must be layers in ascending order, each once, from 1 to "
                    f"num_hidden_layers={self.num_hidden_layers}."
                )
            return exits
        if not 1 <= self.start_layer <= self.num_hidden_layers:
            raise ValueError(
                f"start_layer is {self.start_layer}, but must lie in 1 to num_hidden_layers={self.num_hidden_layers}."
            )
        if self.layer_sep < 1:
            raise ValueError(f"layer_sep is {self.layer_sep}, but must be at least 1.")
        return list(range(self.start_layer, self.num_hidden_layers + 1, self.layer_sep))

    @classmethod
    def read(cls, path: str | PathLike[str], **hub: Any) -> Self:
        """The configuration of a checkpoint, which may be a raw one.

        Raises:
            ValueError: if it is of another model type.
        """
        stored, _ = cls.get_config_dict(path, **hub)
        if stored.get("model_type") not in (cls.model_type, *cls.made_from):
            raise ValueError(
                f"{path} holds a model of type {stored.get('model_type')!r}; a {cls.model_type!r} is made from "
                f"{' or '.join(map(repr, cls.made_from))}, or loaded from its own checkpoints."
            )
        return cls.from_dict(stored)

    def cut(self, layers: int) -> None:
        """Leave the lowest `layers` decoder layers, and the exits among them."""
        if self.exits is not None:
            self.exits = [layer for layer in self.exits if layer <= layers]
        layer_types = getattr(self, "layer_types", None)
        if layer_types is not None:
            self.layer_types = layer_types[:layers]
        self.num_hidden_layers = layers


def as_layer_tuple(name: str, layers: int | Iterable[int] | None) -> tuple[int, ...] | None:
    """`layers`, an int or several, as a tuple; None stays None.

    Raises:
        TypeError: if a value is not an int.
    """
    if layers is None:
        return None
    values = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    for value in values:
        if not hasattr(value, "__index__") or isinstance(value, bool):
            raise TypeError(f"{name} must be an int or a list of ints, got {value!r} in {layers!r}.")
    return tuple(map(operator.index, values))


@dataclass(frozen=True)
class SubNetwork:
    """The depth and width of one pass.

    Attributes:
        cutoff_layers: exits to score at, in the order in which scores are returned.
        compress_layers: number of layers after which the passage is compressed, ascending, each once.
        compress_ratio: how many neighbouring passage tokens become one there.
    """

    cutoff_layers: tuple[int, ...]
    compress_layers: tuple[int, ...] = ()
    compress_ratio: int = 1

    @property
    def depth(self) -> int:
        """Number of decoder layers that run."""
        return max(self.cutoff_layers)

    def compresses_after(self, layer: int) -> bool:
        """Whether the passage shrinks once `layer` decoder layers have run. Nothing shrinks behind the last exit."""
        return self.compress_ratio > 1 and layer < self.depth and layer in self.compress_layers

    @classmethod
    def resolve(
        cls,
        config: CostWiseConfig,
        cutoff_layers: int | Iterable[int] | None = None,
        compress_layers: int | Iterable[int] | None = None,
        compress_ratio: int | None = None,
    ) -> SubNetwork:
        """Check a request against the exits and layers that a model has.

        Args:
            cutoff_layers: exits; None is the deepest alone.
            compress_layers: layers to compress after; None is nowhere.
            compress_ratio: 1 (off), 2, 4 or 8; None is 1.

        Raises:
            TypeError: if a layer is not an int.
            ValueError: if a layer or ratio does not exist, or a ratio is given with no layer to apply it at.
        """
        exits = config.exit_layers
        cutoffs = as_layer_tuple("cutoff_layers", cutoff_layers)
        if cutoffs is None:
            cutoffs = (exits[-1],)
        if not cutoffs:
            raise ValueError(f"cutoff_layers is empty. This model's exits are {exits}.")
        unknown = [layer for layer in cutoffs if layer not in exits]
        if unknown:
            raise ValueError(f"cutoff_layers {unknown} have no head. This model's exits are {exits}.")

        compress = as_layer_tuple("compress_layers", compress_layers) or ()
        outside = [layer for layer in compress if not 1 <= layer <= config.num_hidden_layers]
        if outside:
            raise ValueError(
                f"compress_layers {outside} do not exist. A compress layer is the number of decoder layers that have "
                f"run, from 1 to {config.num_hidden_layers}."
            )

        ratio = 1 if compress_ratio is None else compress_ratio
        if ratio not in COMPRESS_RATIOS or isinstance(ratio, bool):
            raise ValueError(
                f"compress_ratio is {compress_ratio!r}, but must be one of {list(COMPRESS_RATIOS)}: the model is "
                "trained with these, so that ratios nest and one adapter per ratio can be fitted."
            )
        if ratio > 1 and not compress:
            raise ValueError(f"compress_ratio={ratio} needs compress_layers that say where to compress.")
        return cls(cutoffs, tuple(sorted(set(compress))), int(ratio))
