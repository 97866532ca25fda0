"""The plain cross-encoder, as one gets it from transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase

from flagembedding_matryoshka import MatryoshkaReranker

BATCH_SIZE = 32


class PlainCrossEncoder(nn.Module):
    """transformers' decoder under one linear output, on padded batches."""

    def __init__(self, ours: MatryoshkaReranker) -> None:
        super().__init__()
        (kind,) = ours.config.made_from
        shape = {name: value for name, value in ours.config.to_dict().items() if name != "model_type"}
        config = AutoConfig.for_model(kind, **shape)
        # transformers' fused attention leaves a cap on logits out
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
        with ours.model.device:
            self.decoder = AutoModel.from_config(config, dtype=ours.model.dtype, attn_implementation=attention).eval()
        self.decoder.load_state_dict(ours.model.model.state_dict())
        self.head = ours.model.lm_head[-1].linear_head
        self.ours = ours

    @torch.inference_mode()
    def compute_score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Scores in the order given. The texts become tokens as ours do."""
        inputs = self.ours.tokenize(pairs)
        order = sorted(range(len(pairs)), key=lambda index: -len(inputs[index]))
        scores = torch.empty(len(pairs))
        tokenizer: PreTrainedTokenizerBase = self.ours.tokenizer
        for start in range(0, len(order), BATCH_SIZE):
            places = order[start : start + BATCH_SIZE]
            rows = {"input_ids": [inputs[index].input_ids.tolist() for index in places]}
            batch = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(self.decoder.device)
            hidden = self.decoder(**batch, use_cache=False).last_hidden_state
            last = batch["attention_mask"].sum(1) - 1
            scores[places] = (
                self.head(hidden[torch.arange(len(places)), last].to(self.head.weight.dtype))[:, 0].float().cpu()
            )
        return scores.tolist()
