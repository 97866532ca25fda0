"""FlagEmbedding's own layer-wise fine-tuning: its model, collator and loss.

Its code is of transformers 4. Two of its lines stop it in transformers 5, and are put right here: its rotary embedding
reads `rope_scaling["type"]`, where the configuration now never has None (KeyError: 'type'), and `_tied_weights_keys`
is a list (AttributeError: 'list' object has no attribute 'keys'). Its `CrossDecoderModel` does not ask for the exits
that it has heads for, so that it would train the deepest alone; here it is given all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from FlagEmbedding.abc.finetune.reranker import AbsLLMRerankerCollator, RerankerOutput
from FlagEmbedding.finetune.reranker.decoder_only.layerwise.configuration_minicpm_reranker import LayerWiseMiniCPMConfig
from FlagEmbedding.finetune.reranker.decoder_only.layerwise.modeling import CrossDecoderModel
from FlagEmbedding.finetune.reranker.decoder_only.layerwise.modeling_minicpm_reranker import LayerWiseMiniCPMForCausalLM
from transformers import PreTrainedTokenizerBase

from benchmarks.training.shapes import small_minicpm
from flagembedding_matryoshka import Setting
from flagembedding_matryoshka.finetune.data import Group
from flagembedding_matryoshka.models.configuration import CostWiseConfig


class AllExits(LayerWiseMiniCPMForCausalLM):
    """FlagEmbedding's model, scoring at every exit."""

    _tied_weights_keys = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        exits = list(range(self.config.start_layer, self.config.num_hidden_layers + 1))
        return super().forward(*args, cutoff_layers=exits, **kwargs)


def minicpm_model(config: CostWiseConfig) -> AllExits:
    """A model of the shape of `config`, in float32, as FlagEmbedding's runner loads it."""
    stored = LayerWiseMiniCPMConfig(use_cache=False, **small_minicpm(config.num_hidden_layers, config.hidden_size))
    stored.rope_parameters = None
    return AllExits(stored)


class CrossDecoder(CrossDecoderModel):
    """FlagEmbedding's learning step."""

    def forward(self, pair: dict[str, Any], teacher_scores: list[float], setting: Setting) -> RerankerOutput:
        """Its loss; it knows no setting but the full width."""
        return super().forward(pair, teacher_scores)


def collate(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The groups left-padded, as its runner pads them."""
    features = [
        ([{"input_ids": pair.input_ids.tolist(), "attention_mask": [1] * len(pair)} for pair in pairs], scores)
        for pairs, scores, _ in groups
    ]
    return AbsLLMRerankerCollator(tokenizer)(features)
