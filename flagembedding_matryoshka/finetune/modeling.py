"""The model that learns: scores of groups, and the loss of what they should be."""

from __future__ import annotations

import torch
from FlagEmbedding.abc.finetune.reranker import AbsRerankerModel, RerankerOutput
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.configuration import SubNetwork
from flagembedding_matryoshka.losses import TrainMethod, layer_wise_loss
from flagembedding_matryoshka.modeling import CostWiseMistralForCausalLM


class MatryoshkaCrossEncoder(AbsRerankerModel):
    """Scores groups of pairs at every exit and computes the loss of a training method.

    Args:
        base_model: the layer-wise re-ranker, with or without LoRA adapters.
        method: what is learnt beside the label.
        train_group_size: pairs per query, the positive first.
    """

    def __init__(
        self,
        base_model: CostWiseMistralForCausalLM | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        method: TrainMethod,
        train_batch_size: int,
        train_group_size: int,
    ) -> None:
        super().__init__(base_model, tokenizer=tokenizer, train_batch_size=train_batch_size)
        self.method = method
        self.train_group_size = train_group_size
        self.full_width = SubNetwork.resolve(self.config, self.config.exit_layers)

    def encode(self, features: dict[str, Tensor], sub_network: SubNetwork | None = None) -> Tensor:
        """(exits, queries, group) float32 scores of the pairs in `features`; None is the full width at every exit."""
        sub_network = sub_network or self.full_width
        outputs = self.model(
            **features,
            cutoff_layers=sub_network.cutoff_layers,
            compress_layers=sub_network.compress_layers,
            compress_ratio=sub_network.compress_ratio,
        )
        scores = torch.stack(outputs.logits)
        return scores.view(len(scores), -1, self.train_group_size)

    def forward(
        self,
        pair: dict[str, Tensor],
        teacher_scores: list[float] | None = None,
        sub_network: SubNetwork | None = None,
    ) -> RerankerOutput:
        """Loss, when training, and scores of a batch.

        Args:
            pair: input_ids and attention_mask (queries · group, length), query_lengths and prompt_lengths
                (queries · group,).
            teacher_scores: one per pair; needed by methods that learn from the data's scores.
            sub_network: what the learning pass runs; None is the full width at every exit. A learning pass at full
                width is its own teacher, under the dropout that it was drawn with.
        """
        scores = self.encode(pair, sub_network)
        if not self.training:
            return RerankerOutput(scores=scores)
        full_width = data_scores = None
        if self.method.deeper_exit != "none":
            full_width = scores.detach()
            if sub_network is not None and sub_network.compress_ratio > 1:
                with torch.no_grad():
                    full_width = self.encode(pair)
        if self.method.data_scores != "none" and teacher_scores is not None:
            data_scores = torch.tensor(teacher_scores, device=scores.device).view_as(scores[0])
        loss = layer_wise_loss(self.method, scores, full_width, data_scores)
        return RerankerOutput(loss=loss, scores=scores)

    def save(self, output_dir: str) -> None:
        """Write adapters, or all weights where there are none, and the configuration that they need.

        With adapters the directory names its base and holds the exits, so that it can be loaded by itself.
        """
        self.model.save_pretrained(output_dir)
        self.config.save_pretrained(output_dir)
