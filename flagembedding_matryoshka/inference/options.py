"""What a call to a re-ranker may override."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from flagembedding_matryoshka.models.decoder import Layers
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair

DEPTH_AND_WIDTH = ("cutoff_layers", "compress_layers", "compress_ratio")


@dataclass(frozen=True)
class ScoringOptions:
    """How pairs are put together and scored; the names are those of the re-ranker's constructor."""

    query_instruction_for_rerank: str
    query_instruction_format: str
    passage_instruction_for_rerank: str
    passage_instruction_format: str
    cutoff_layers: Layers
    compress_layers: Layers
    compress_ratio: int
    prompt: str
    batch_size: int
    max_tokens_per_batch: int
    query_max_length: int | None
    max_length: int
    normalize: bool

    @classmethod
    def resolve(cls, defaults: object, overrides: Mapping[str, Any], compress_layer: Layers = None) -> ScoringOptions:
        """The attributes of `defaults` with `overrides`, of which None keeps the default.

        Args:
            compress_layer: the reference's spelling of `compress_layers`.

        Raises:
            TypeError: if an override is unknown.
            ValueError: if a size is less than 1, or both spellings are given.
        """
        if compress_layer is not None:
            if overrides.get("compress_layers") is not None:
                raise ValueError("compress_layer and compress_layers are one argument with two names; give one.")
            overrides = {**overrides, "compress_layers": compress_layer}
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(overrides) - set(names))
        if unknown:
            raise TypeError(f"unknown arguments {unknown}; a call may override {names}.")
        chosen = {name: getattr(defaults, name) if overrides.get(name) is None else overrides[name] for name in names}
        options = cls(**chosen)
        for name in ("batch_size", "max_tokens_per_batch", "max_length", "query_max_length"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        return options

    def tokenize(self, pairs: Sequence[tuple[str, str]], tokenizer: PairTokenizer) -> list[TokenizedPair]:
        """Input sequences of query and passage.

        Raises:
            ValueError: if a query leaves no room for its passage.
        """
        template = replace(
            tokenizer.template,
            query_instruction=self.query_instruction_for_rerank,
            query_format=self.query_instruction_format,
            passage_instruction=self.passage_instruction_for_rerank,
            passage_format=self.passage_instruction_format,
            prompt=self.prompt,
        )
        return tokenizer.build_within(pairs, self.query_max_length, self.max_length, template)


def names_depth_or_width(overrides: Mapping[str, Any]) -> bool:
    """Whether a call chooses itself what a plan would choose for it."""
    return any(overrides.get(name) is not None for name in (*DEPTH_AND_WIDTH, "compress_layer"))
