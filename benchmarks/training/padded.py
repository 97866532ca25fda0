"""The baseline: a training step as the research code takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from FlagEmbedding.abc.finetune.reranker import AbsRerankerModel, RerankerOutput
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, MistralForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, eager_attention_forward

from flagembedding_matryoshka import CostWiseMistralConfig, Setting
from flagembedding_matryoshka.finetune.data import Group
from flagembedding_matryoshka.models.batch import compressed_lengths
from flagembedding_matryoshka.models.causal_lm import CostWiseHead

PADDED_ATTENTION = "padded_baseline"


def padded_attention(
    module: nn.Module, *tensors: Tensor | None, return_map: bool, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function in the form of `AttentionInterface`: with its map, or without and faster."""
    attend = eager_attention_forward if return_map else sdpa_attention_forward
    return attend(module, *tensors, **kwargs)


AttentionInterface.register(PADDED_ATTENTION, padded_attention)


class PaddedLayer(MistralDecoderLayer):
    """A Mistral layer that returns its attention map, as all layers of transformers 4 could."""

    def forward(self, hidden_states: Tensor, **attention: Any) -> tuple[Tensor, Tensor | None]:
        """(batch, length, hidden) and, where asked for, (batch, heads, length, length)."""
        attended, attention_map = self.self_attn(self.input_layernorm(hidden_states), **attention)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), attention_map


class PaddedMistral(MistralForCausalLM):
    """The layer-wise, compressing Mistral on a padded batch; its weights are named as ours are."""

    def __init__(self, config: CostWiseMistralConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(PaddedLayer(config, index) for index in range(config.num_hidden_layers))
        self.lm_head = nn.ModuleList(CostWiseHead(config.hidden_size) for _ in config.exit_layers)
        self.set_attn_implementation(PADDED_ATTENTION)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        query_lengths: Tensor,
        prompt_lengths: Tensor,
        setting: Setting,
        **unused: Any,
    ) -> Tensor:
        """(exits, batch) float32 scores, from the shallowest exit to the deepest."""
        hidden, mask = self.model.embed_tokens(input_ids), attention_mask.bool()
        rows = torch.arange(len(hidden), device=hidden.device)
        attention = self._attention_arguments(hidden, mask)
        scores = []
        for depth, layer in enumerate(self.model.layers, start=1):
            hidden, attention_map = layer(hidden, return_map=setting.compress_ratio > 1, **attention)
            last = mask.sum(1) - 1
            if depth in setting.cutoff_layers:
                scores.append(self.lm_head[len(scores)](self.model.norm(hidden))[rows, last])
            if setting.compresses_after(depth):
                weights = attention_map[rows, :, last].sum(1)
                ratio = setting.compress_ratio
                hidden, mask = compress_padded(hidden, mask, weights, query_lengths, prompt_lengths, ratio)
                attention = self._attention_arguments(hidden, mask)
        return torch.stack(scores)

    def _attention_arguments(self, hidden: Tensor, mask: Tensor) -> dict[str, Any]:
        length = hidden.shape[1]
        seen = mask[:, None, None] & mask.new_ones(length, length).tril()
        bias = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        positions = torch.arange(length, device=hidden.device)[None]
        return {"attention_mask": bias, "position_embeddings": self.model.rotary_emb(hidden, positions)}


def compress_padded(
    hidden: Tensor, mask: Tensor, weights: Tensor, query_lengths: Tensor, prompt_lengths: Tensor, ratio: int
) -> tuple[Tensor, Tensor]:
    """Merge groups of `ratio` neighbouring passage tokens of a right-padded batch.

    Args:
        hidden: (batch, length, hidden).
        mask: (batch, length) bool, True on tokens.
        weights: (batch, length), how much the last token attends to each.
        query_lengths, prompt_lengths: (batch,) tokens before and behind the passage.

    Returns:
        (batch, shorter length, hidden) and its mask.
    """
    batch, length, width = hidden.shape
    query, prompt = query_lengths[:, None], prompt_lengths[:, None]
    passage = mask.sum(1, keepdim=True) - query - prompt
    kept = compressed_lengths(passage, ratio)
    groups, new_length = int(kept.max()), int((query + kept + prompt).max())

    def positions(count: int) -> Tensor:
        return torch.arange(count, device=hidden.device)[None]

    in_passage = (positions(length) >= query) & (positions(length) < query + passage)
    aligned = positions(groups * ratio) < passage
    tokens = hidden.new_zeros(batch, groups * ratio, width)
    tokens[aligned] = hidden[in_passage]
    shares = weights.new_zeros(batch, groups * ratio)
    shares[aligned] = weights[in_passage]
    shares = shares.view(batch, groups, ratio)
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    merged = (tokens.view(batch, groups, ratio, width) * shares[..., None]).sum(2)

    new_mask = positions(new_length) < query + kept + prompt
    new_passage = (positions(new_length) >= query) & (positions(new_length) < query + kept)
    compressed = hidden.new_zeros(batch, new_length, width)
    compressed[new_mask & ~new_passage] = hidden[mask & ~in_passage]
    compressed[new_passage] = merged[positions(groups) < kept].to(hidden.dtype)
    return compressed, new_mask


def collate(groups: Sequence[Group]) -> dict[str, Any]:
    """The pairs of all groups right-padded, with their part lengths."""
    pairs = [pair for group in groups for pair in group.pairs]
    ids = [torch.tensor(pair.input_ids).long() for pair in pairs]
    return {
        "pair": {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "query_lengths": torch.tensor([pair.query_length for pair in pairs]),
            "prompt_lengths": torch.tensor([pair.prompt_length for pair in pairs]),
        },
        "teacher_scores": [score for group in groups for score in group.scores or ()],
    }


class PaddedCrossEncoder(AbsRerankerModel):
    """The research code's learning step; the counterpart of `MatryoshkaRerankerModel`."""

    def __init__(self, base_model: PeftModel, train_group_size: int, **kwargs: Any) -> None:
        super().__init__(base_model, **kwargs)
        self.train_group_size = train_group_size

    def encode(self, features: dict[str, Tensor], setting: Setting) -> Tensor:
        """(exits, queries, group) scores."""
        scores = self.model(**features, setting=setting)
        return scores.view(len(scores), -1, self.train_group_size)

    def forward(self, pair: dict[str, Tensor], teacher_scores: list[float], setting: Setting) -> RerankerOutput:
        """The loss of `distill_fix_layer_teacher`."""
        student = self.encode(pair, setting)
        full_width = self.encode(pair, replace(setting, compress_layers=(), compress_ratio=1))
        data_shares = torch.tensor(teacher_scores, device=student.device).view_as(student[0]).softmax(-1)
        loss = torch.zeros((), device=student.device)
        teacher_shares = None
        for index, (scores, deeper_scores) in enumerate(zip(student.flip(0), full_width.flip(0), strict=True)):
            log_shares = scores.log_softmax(-1)
            loss = loss - log_shares[:, 0].mean() - (data_shares * log_shares).sum(-1).mean()
            if teacher_shares is not None:
                loss = loss - (teacher_shares * log_shares).sum(-1).mean()
            if index % 8 == 0:
                teacher_shares = deeper_scores.detach().softmax(-1)
        return RerankerOutput(loss=loss, scores=student)
