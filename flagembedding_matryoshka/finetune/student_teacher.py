"""A Matryoshka re-ranker as a teacher, also of itself in a second round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sentence_transformers.util import get_device_name
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, cached_file

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratios, use_token_adapter
from flagembedding_matryoshka.checkpoints.describing import MAX_LENGTH
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.checkpoints.shipped import locate
from flagembedding_matryoshka.models.packing import pack_pairs
from flagembedding_matryoshka.setting import Layers, Setting
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair
from flagembedding_matryoshka.text.templates import Template


def is_layer_wise(model: str) -> bool:
    """Return whether a checkpoint has exits: "smollm2", or one whose config.json says layer_wise."""
    place = locate(model)
    if cached_file(place, CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is None:
        return False
    config, _ = PreTrainedConfig.get_config_dict(place)
    return bool(config.get("layer_wise"))


class StudentTeacher:
    """Raw scores of a layer-wise checkpoint at one exit and width, as `MatryoshkaReranker.compute_score` returns them.

    Neighbouring pairs of one query share its states, and batches have no padding.

    Args:
        model: "smollm2", or a layer-wise checkpoint, such as a directory that fine-tuning wrote.
        batch_size: pairs scored in one pass.
        cutoff_layers: the exit; None is the deepest.
        compress_layers, compress_ratio: as in `MatryoshkaReranker`.
        max_length, query_max_length: tokens, as in `MatryoshkaReranker`; None is the checkpoint's own limit.
        device: None is the first accelerator, or the CPU if there is none.
        dtype: format of weights and products; scores are float32.
        trust_remote_code: as in transformers, for the tokenizer alone.

    Raises:
        ValueError: if the checkpoint has no such setting, before its weights are read.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 64,
        cutoff_layers: int | None = None,
        compress_layers: Layers = None,
        compress_ratio: int = 1,
        max_length: int | None = None,
        query_max_length: int | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        checkpoint = inspect_checkpoint(model, trust_remote_code=trust_remote_code)
        description = checkpoint.description
        description.check_scoring()
        self.setting = Setting.resolve(checkpoint.config, cutoff_layers, compress_layers, compress_ratio)
        self.batch_size = batch_size
        self.max_length = max_length or description.max_length.value or MAX_LENGTH
        self.query_max_length = query_max_length or description.query_max_length.value
        self.template = Template.load(checkpoint.config.template).with_instruction(None)
        tokenizer = load_tokenizer(model, trust_remote_code)
        self.tokenizer = PairTokenizer(tokenizer, self.template)
        loaded: Any = load_model(checkpoint, tokenizer, dtype, attach_token_adapters=True)
        self.model = loaded.to(device or get_device_name()).eval()
        if token_adapter_ratios(self.model):
            use_token_adapter(self.model, self.setting.compress_ratio)

    @torch.inference_mode()
    def __call__(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Return the scores of the pairs, (pairs,) float32."""
        scores = [
            self.model.scores(self.model.model.embed(*pack_pairs(batch, self.model.device)), self.setting)[0]
            for batch in self._batches(pairs)
        ]
        return torch.cat(scores).float().cpu().numpy()

    def _batches(self, pairs: list[tuple[str, str]]) -> Iterator[list[TokenizedPair]]:
        lengths = self.query_max_length, self.max_length
        for start in range(0, len(pairs), self.batch_size):
            yield self.tokenizer.build_within(pairs[start : start + self.batch_size], *lengths, self.template)
