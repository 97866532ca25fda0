"""The graph of a classifier and its directory, for ONNX and OpenVINO."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flagembedding_matryoshka.checkpoints.export.layerwise import remove_written
from flagembedding_matryoshka.checkpoints.export.plain import Classifier, write_files

INPUTS = ("input_ids", "attention_mask")
OUTPUT = "logits"
TRACED = 2, 9
"""Sequences and tokens of the traced batch. Any other batch has the same graph."""


class Scores(nn.Module):
    """A classifier with two inputs and one output."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, 1) float32 scores of (batch, length) int64 tokens."""
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits.float()


def example_inputs() -> tuple[Tensor, Tensor]:
    """A batch to trace with: token ids and mask, the second sequence padded."""
    ids, mask = torch.ones(TRACED, dtype=torch.int64), torch.ones(TRACED, dtype=torch.int64)
    mask[1, 5:] = 0
    return ids, mask


def write_graph(
    classifier: Classifier,
    directory: str | Path,
    format: str,
    file: str,
    convert: Callable[[Scores], Any],
    save: Callable[[Any, str], object],
) -> None:
    """Convert a classifier, and replace the checkpoint in `directory` by its file, tokenizer and configuration.

    Args:
        format: as of `MatryoshkaReranker.export`; the file is written to a folder of this name, where
            sentence-transformers and optimum look for it.
        file: name of the graph's file.
        convert: returns the graph. Its warnings are not shown: they are about torch and the converter themselves.
        save: writes the graph to a path.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = convert(Scores(classifier.model))
    remove_written(directory)
    write_files(classifier, directory, format)
    folder = Path(directory, format)
    folder.mkdir(exist_ok=True)
    save(graph, str(folder / file))
