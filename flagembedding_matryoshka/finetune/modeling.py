"""The model that learns: scores of groups, and the loss of what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from FlagEmbedding.abc.finetune.reranker import AbsRerankerModel, RerankerOutput
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.finetune.collators import PackedPairs
from flagembedding_matryoshka.finetune.losses import DistillLoss, TrainMethod, layer_wise_losses
from flagembedding_matryoshka.finetune.sharding import Shardable
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.setting import Setting


@dataclass
class MatryoshkaOutput(RerankerOutput):
    """Loss and scores of one pass.

    Attributes:
        terms: what the loss is the sum of, detached scalars named `layer_{exit}_{term}`; None when not training.
        spreads: (exits,) mean standard deviation of the scores within a group, detached; None when not training.
    """

    terms: dict[str, Tensor] | None = None
    spreads: Tensor | None = None


class MatryoshkaRerankerModel(Shardable, AbsRerankerModel):
    """Scores groups of pairs at every exit and computes the loss of a training method.

    Args:
        base_model: the layer-wise re-ranker, with or without LoRA adapters.
        method: what is learnt beside the label.
        train_group_size: pairs per query, the positive first.
        distill_loss: how scores are compared with those of a teacher.
        exit_weights: what each exit's loss counts, from the shallowest; None is 1 for each.

    Raises:
        ValueError: if there is not one weight for each exit, or `method` has the original model as its teacher and
            there are no adapters that could be switched off to find it.
    """

    def __init__(
        self,
        base_model: CostWiseForCausalLM | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        method: TrainMethod,
        train_batch_size: int,
        train_group_size: int,
        distill_loss: DistillLoss = "ce",
        exit_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(base_model, tokenizer=tokenizer, train_batch_size=train_batch_size)
        self.method = method
        self.train_group_size = train_group_size
        self.distill_loss = distill_loss
        self.full_width = Setting.resolve(self.config, self.config.exit_layers)
        exits = self.full_width.cutoff_layers
        self.exit_weights = [1.0] * len(exits) if exit_weights is None else list(exit_weights)
        if len(self.exit_weights) != len(exits):
            raise ValueError(f"exit_weights {self.exit_weights} must be one for each of the exits {list(exits)}.")
        if method.original and not isinstance(base_model, PeftModel):
            raise ValueError("the original model teaches, but without adapters nothing of it is left: use LoRA.")

    def encode(
        self, features: PackedPairs, setting: Setting | None = None, return_full_width: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of the pairs in `features` and, where asked for, those without compression and graph.

        Returns:
            (exits, pairs) float32 each; `setting` None is the full width at every exit.
        """
        setting = setting or self.full_width
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        states = model.model.embed(features.token_ids, features.packed)
        outputs = model.forward_packed(states, setting, return_full_width)
        full_width = torch.stack(outputs.full_width_logits) if return_full_width else None
        return torch.stack(outputs.logits), full_width

    @torch.no_grad()
    def original_scores(self, features: PackedPairs) -> Tensor:
        """(pairs,) float32: what the model scored, at its deepest exit and full width, before anything was learnt."""
        training = self.model.training
        self.model.eval()
        with self.model.disable_adapter():
            scores, _ = self.encode(features, Setting.resolve(self.config))
        self.model.train(training)
        return scores[0]

    def forward(
        self,
        pair: PackedPairs,
        teacher_scores: Tensor | None = None,
        setting: Setting | None = None,
    ) -> MatryoshkaOutput:
        """Loss, when training, and (exits, pairs) scores of a batch.

        Args:
            pair: queries · group pairs. Groups may be of any size when not training.
            teacher_scores: (queries · group,) float; needed by methods that learn from the data's scores.
            setting: what the learning pass runs; None is the full width at every exit. Where nothing has been
                compressed yet the learning pass is its own teacher, under the dropout that it was drawn with.
        """
        # Before the learning pass, whose graph would fill the memory beside it.
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
            self.distill_loss,
            None if original is None else original.view(groups[1:]),
        )
        terms = {
            f"layer_{layer}_{name}": term
            for layer, losses in zip(self.full_width.cutoff_layers, exits, strict=True)
            for name, term in losses.items()
        }
        per_exit = [
            weight * torch.stack(list(losses.values())).sum()
            for weight, losses in zip(self.exit_weights, exits, strict=True)
        ]
        return MatryoshkaOutput(
            loss=torch.stack(per_exit).sum(),
            scores=scores,
            terms={name: term.detach() for name, term in terms.items()},
            spreads=scores.detach().view(groups).std(-1).mean(-1),
        )

    def save(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write adapters, or all weights where there are none, and the configuration that they need.

        With adapters the directory names its base and holds the exits, so that it can be loaded by itself.

        Args:
            state_dict: this module's weights, where they have been gathered from several processes.
        """
        weights = None
        if state_dict is not None:
            weights = {name.removeprefix("model."): value for name, value in state_dict.items()}
        # No vocabulary is changed; left to itself, peft asks the hub for the base to find that out.
        options = {"save_embedding_layers": False} if isinstance(self.model, PeftModel) else {}
        self.model.save_pretrained(output_dir, state_dict=weights, **options)
        self.config.save_pretrained(output_dir)
