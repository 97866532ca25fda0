"""The trained model, which scores groups and computes their loss, and the modules that get an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from FlagEmbedding.abc.finetune.reranker import AbsRerankerModel, RerankerOutput
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.finetune.data import PackedPairs
from flagembedding_matryoshka.finetune.losses import DEFAULT_TERMS, LossTerms, TrainMethod, layer_wise_losses
from flagembedding_matryoshka.finetune.sharding import Shardable
from flagembedding_matryoshka.models.backbones import causal_lm_class
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.decoder import without_graph
from flagembedding_matryoshka.setting import Setting

ALL_LINEAR = "all-linear"
"""peft's name for all linear modules."""


@dataclass
class MatryoshkaOutput(RerankerOutput):
    """Loss and scores of one pass.

    Attributes:
        terms: terms of the loss, detached scalars named `layer_{exit}_{term}`; None when not training.
        spreads: (exits,) mean standard deviation of the scores within a group, detached; None when not training.
    """

    terms: dict[str, Tensor] | None = None
    spreads: Tensor | None = None


class MatryoshkaRerankerModel(Shardable, AbsRerankerModel):
    """Scores groups of pairs at every exit and computes the loss of a training method.

    Args:
        base_model: the layer-wise re-ranker, with or without LoRA adapters.
        tokenizer: the tokenizer.
        method: the teachers.
        train_batch_size: queries in a pass.
        train_group_size: pairs per query, a positive first.
        loss_terms: losses and weights of the terms.
        exit_weights: weights of the exits' losses, from the shallowest exit; None is 1 for each.

    Raises:
        ValueError: if there is not one weight for each exit, or the teacher is the model before training and there are
            no adapters to switch off.
    """

    def __init__(
        self,
        base_model: CostWiseForCausalLM | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        method: TrainMethod,
        train_batch_size: int,
        train_group_size: int,
        loss_terms: LossTerms = DEFAULT_TERMS,
        exit_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(base_model, tokenizer=tokenizer, train_batch_size=train_batch_size)
        self.method = method
        self.train_group_size = train_group_size
        self.loss_terms = loss_terms
        self.full_width = Setting.resolve(self.config, self.config.exit_layers)
        exits = self.full_width.cutoff_layers
        self.exit_weights = [1.0] * len(exits) if exit_weights is None else list(exit_weights)
        if len(self.exit_weights) != len(exits):
            raise ValueError(f"exit_weights are {self.exit_weights}, but must be one for each exit: {list(exits)}.")
        if method.original and not isinstance(base_model, PeftModel):
            raise ValueError(
                "self_distill needs adapters: without them training changes the weights of the teacher. Use LoRA."
            )

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the activations of each layer in the backward pass. transformers calls it from 5.23 on."""
        self.model.activation_checkpointing_enable(**kwargs)

    def encode(
        self, features: PackedPairs, setting: Setting | None = None, return_full_width: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Score pairs.

        Args:
            features: the pairs.
            setting: None is the full width at every exit. With a store layer, the exits up to it are scored, too, in a
                pass of their own, at full width and without a store layer.
            return_full_width: also score without compression, and without a graph.

        Returns:
            (exits, pairs) float32 scores, and the scores without compression; None if they are not asked for.
        """
        setting = setting or self.full_width
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        below = [layer for layer in self.config.exit_layers if layer <= setting.store_layer]
        logits: list[Tensor] = []
        full_width: list[Tensor] = []
        for of_pass in (*([Setting(tuple(below))] if below else []), setting):
            states = model.model.embed(features.token_ids, features.packed, of_pass)
            outputs = model.forward_packed(states, of_pass, return_full_width)
            logits += outputs.logits
            full_width += outputs.full_width_logits or ()
        return torch.stack(logits), torch.stack(full_width) if return_full_width else None

    def original_scores(self, features: PackedPairs) -> Tensor:
        """Return the scores of the model before training, at its deepest exit and full width, (pairs,) float32."""
        training = self.model.training
        self.model.eval()
        with without_graph(features.token_ids.device.type), self.model.disable_adapter():
            scores, _ = self.encode(features, Setting.resolve(self.config))
        self.model.train(training)
        return scores[0]

    def forward(
        self,
        pair: PackedPairs,
        teacher_scores: Tensor | None = None,
        grades: Tensor | None = None,
        setting: Setting | None = None,
    ) -> MatryoshkaOutput:
        """Return the scores of a batch, (exits, pairs), and, when training, the loss.

        Args:
            pair: queries · group pairs. When not training, groups may have any size.
            teacher_scores: (queries · group,) float; needed by methods that learn from the scores in the data.
            grades: (queries · group,) float; needed by losses with several positives in a group.
            setting: the setting of the trained pass, as in `encode`. Exits before the first compression have the
                trained pass as their teacher, with the same dropout.
        """
        # Before the trained pass, whose graph would take memory at the same time.
        original = self.original_scores(pair) if self.training and self.method.original else None
        scores, full_width = self.encode(pair, setting, self.training and self.method.deeper_exit != "none")
        if not self.training:
            return MatryoshkaOutput(scores=scores)
        groups = (len(scores), -1, self.train_group_size)
        data_scores = None
        if self.method.data_scores != "none" and teacher_scores is not None:
            data_scores = teacher_scores.view(groups[1:])
        exits = layer_wise_losses(
            self.method,
            scores.view(groups),
            None if full_width is None else full_width.view(groups),
            data_scores,
            self.loss_terms,
            None if original is None else original.view(groups[1:]),
            None if grades is None else grades.view(groups[1:]),
        )
        terms = {
            f"layer_{layer}_{name}": term
            for layer, losses in zip(self.full_width.cutoff_layers, exits, strict=True)
            for name, term in losses.items()
        }
        per_exit = [
            weight * self.loss_terms.weighted_sum(losses)
            for weight, losses in zip(self.exit_weights, exits, strict=True)
        ]
        return MatryoshkaOutput(
            loss=torch.stack(per_exit).sum(),
            scores=scores,
            terms={name: term.detach() for name, term in terms.items()},
            spreads=scores.detach().view(groups).std(-1).mean(-1),
        )

    def save(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the adapters, or all weights if there are none, and the configuration.

        A directory of adapters names its base and has the exits, so that its path is enough to load it.

        Args:
            output_dir: directory to write to.
            state_dict: this module's weights, if they were gathered from several processes; None is the module's own.
        """
        weights = None
        if state_dict is not None:
            weights = {name.removeprefix("model."): value for name, value in state_dict.items()}
        # Training does not change the vocabulary. By default peft would ask the hub for the base to find that out.
        options = {"save_embedding_layers": False} if isinstance(self.model, PeftModel) else {}
        self.model.save_pretrained(output_dir, state_dict=weights, **options)
        self.config.save_pretrained(output_dir)


def convert_target_modules(target_modules: Sequence[str] | str | None) -> list[str] | str | None:
    """Convert `target_modules` to peft's form: names as a list, a regular expression or "all-linear" as a string.

    Args:
        target_modules: from the command line, where a single value is a list, too. A single value with other
            characters than letters, digits, "_" and "." is a regular expression.
    """
    if target_modules is None or isinstance(target_modules, str):
        return target_modules
    if len(target_modules) == 1 and not re.fullmatch(r"[\w.]+", target_modules[0]):
        return target_modules[0]
    return list(target_modules)


def refuse_unknown_modules(
    config: CostWiseConfig,
    target_modules: Sequence[str] | str | None,
    modules_to_save: Sequence[str] | None,
) -> None:
    """Raise ValueError on names of modules that the model does not have. No weights are loaded.

    Args:
        config: configuration of the layer-wise model.
        target_modules: as `convert_target_modules` returns them; None is not checked.
        modules_to_save: names of modules; None is not checked.
    """
    if target_modules in (None, ALL_LINEAR) and not modules_to_save:
        return
    with torch.device("meta"):
        modules = dict(causal_lm_class(config)(config).named_modules())
    model = f"a {config.model_type.removeprefix('cost_wise_')} re-ranker"
    matrices = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Embedding)]
    if isinstance(target_modules, str):
        if target_modules != ALL_LINEAR and not any(re.fullmatch(target_modules, name) for name in matrices):
            raise ValueError(
                f"target_modules={target_modules!r} is a regular expression and matches the whole name of no linear "
                f"module, such as {matrices[-1]!r}. {_known(matrices)}"
            )
    elif target_modules is not None:
        unknown = [name for name in target_modules if not any(f".{key}".endswith(f".{name}") for key in matrices)]
        if unknown:
            raise ValueError(f"target_modules: {model} has no {', '.join(unknown)}. {_known(matrices)}")
    # peft compares the ends of names, and cannot save a ModuleList or ModuleDict.
    whole = [name for name, module in modules.items() if not isinstance(module, nn.ModuleList | nn.ModuleDict)]
    unknown = [name for name in modules_to_save or () if not any(key.endswith(name) for key in whole)]
    if unknown:
        with_weights = [name for name in whole if any(True for _ in modules[name].parameters(recurse=False))]
        raise ValueError(f"modules_to_save: {model} has no {', '.join(unknown)}. {_known(with_weights)}")


def _known(names: Iterable[str]) -> str:
    return f"It has {', '.join(sorted({name.rpartition('.')[2] for name in names}))}."
