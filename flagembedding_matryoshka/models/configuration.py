"""The configuration of a layer-wise model."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flagembedding_matryoshka.models.refusals import refuse_not_causal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Config
    from typing_extensions import Self
else:  # a mixin: the configuration of the backbone comes behind it
    _Config = object


@dataclass(kw_only=True)
class CostWiseConfig(_Config):
    """The values that a layer-wise model's configuration has beside those of its decoder.

    Args:
        layer_wise: one scoring head per exit; without it the checkpoint is a plain causal language model.
        start_layer: the shallowest exit, counted in decoder layers that have run (1 to `num_hidden_layers`).
        layer_sep: distance between neighbouring exits.
        exits: all exits, ascending, if they are not evenly spaced; `start_layer` and `layer_sep` are then not used.
        template: the text around query and passage: a name, or the JSON value of a
            [`Template`][flagembedding_matryoshka.text.templates.Template].
        head_token_id: row of a raw checkpoint's `lm_head` that every head starts from, or two rows, of which the second
            is subtracted, see [`~flagembedding_matryoshka.text.pairs.find_head_token_ids`]; None is a random start.
        head_scale: factor of that row; a small one starts training at the loss of chance.
        compress_weights: weights of passage tokens that are merged: the last token's "attention" to them (CostWise
            Mistral), or "equal" (FlagEmbedding's lightweight Gemma-2).
        base_exits: exits of an adapter's base, if the adapter beside this configuration was trained for other exits.
            Heads of new exits then start as the base's deepest head. None: the base has the same exits.
        raw_peft: adapters that were merged into the base before the adapter beside this configuration was trained.
        compensation: the setting that this adapter compensates, {"axis": "layer" or "token", "compress_ratio": …}; None
            for an adapter of the first stage (paper, section on factorized compensation).
    """

    made_from: ClassVar[tuple[str, ...]]
    """The `model_type` of raw checkpoints, and of published re-rankers with the same decoder."""

    layer_wise: bool = False
    start_layer: int = 4
    layer_sep: int = 1
    exits: list[int] | tuple[int, ...] | None = None
    template: str | dict[str, Any] = "cost_wise"
    head_token_id: int | list[int] | tuple[int, ...] | None = None
    head_scale: float = 1.0
    compress_weights: Literal["attention", "equal"] = "attention"
    base_exits: list[int] | tuple[int, ...] | None = None
    raw_peft: list[str] | tuple[str, ...] = ()
    compensation: dict[str, int | str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Published checkpoints point at remote code here; ours is the only code that runs.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    @property
    def exit_layers(self) -> list[int]:
        """The exits, ascending: `exits`, or start_layer, start_layer + layer_sep, …

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
        """Read the configuration of a layer-wise or raw checkpoint.

        Raises:
            ValueError: if it is of another model type.
        """
        stored, _ = cls.get_config_dict(path, **hub)
        if stored.get("model_type") not in (cls.model_type, *cls.made_from):
            raise ValueError(
                f"{path} holds a model of type {stored.get('model_type')!r}; a {cls.model_type!r} is made from "
                f"{' or '.join(map(repr, cls.made_from))}, or loaded from its own checkpoints."
            )
        refuse_not_causal(path, stored)
        return cls.from_dict(stored)

    def become_classifier(self) -> None:
        """Describe a sequence classifier of transformers: a re-ranker with one exit, at the last layer."""
        self.layer_wise = True
        self.exits = [self.num_hidden_layers]
        if hasattr(self, "final_logit_softcapping"):
            setattr(self, "final_logit_softcapping", None)  # noqa: B010 - of Gemma alone; a classifier has no cap

    def cut(self, layers: int) -> None:
        """Keep the lowest `layers` decoder layers and the exits among them."""
        if self.exits is not None:
            self.exits = [layer for layer in self.exits if layer <= layers]
        layer_types = getattr(self, "layer_types", None)
        if layer_types is not None:
            self.layer_types = layer_types[:layers]
        self.num_hidden_layers = layers
