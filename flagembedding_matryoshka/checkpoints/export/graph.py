"""Graphs of classifiers and their directories, for ONNX and OpenVINO."""

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
"""Numbers of sequences and tokens of the traced batch. The graph is the same for any batch."""


class Scores(nn.Module):
    """A classifier with two inputs and one output."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (batch, 1) float32 scores of (batch, length) int64 tokens."""
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits.float()


def example_inputs() -> tuple[Tensor, Tensor]:
    """Return token ids and mask of a batch to trace, whose second sequence is padded."""
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
        format: as in `MatryoshkaReranker.export`. The file goes to a folder of this name, where sentence-transformers
            and optimum look for it.
        file: name of the graph's file.
        convert: a callable that returns the graph. Its warnings are not shown, because they concern torch and the
            converter alone.
        save: a callable that writes the graph to a path.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = convert(Scores(classifier.model))
    remove_written(directory)
    write_files(classifier, directory, format)
    folder = Path(directory, format)
    folder.mkdir(exist_ok=True)
    save(graph, str(folder / file))
