"""One exit in ONNX, for onnxruntime."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flagembedding_matryoshka.checkpoints.export.layerwise import remove_written
from flagembedding_matryoshka.checkpoints.export.plain import Exit, classifier_of, write_files

INPUTS = ("input_ids", "attention_mask")
PADDED = 2, 9
"""Sequences and tokens of the traced batch. Any other batch has the same graph."""


class Scores(nn.Module):
    """A classifier with two inputs and one output."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, 1) float32 scores of (batch, length) int64 tokens."""
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits.float()


def example_inputs() -> tuple[Tensor, Tensor]:
    """A batch to trace with: token ids and mask, the second sequence padded."""
    ids, mask = torch.ones(PADDED, dtype=torch.int64), torch.ones(PADDED, dtype=torch.int64)
    mask[1, 5:] = 0
    return ids, mask


def dynamic_shapes() -> dict[str, Any]:
    """Both dimensions of both inputs may be any."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    return {name: {0: batch, 1: length} for name in INPUTS}


def export_onnx(exit: Exit, directory: str | Path, allow_uncapped: bool = False) -> None:
    """Write an exit in float32 to `onnx/model.onnx`, with tokenizer and configuration. Batch and length are free.

    Args:
        allow_uncapped: as of `classifier_of`.

    Raises:
        ImportError: if the package `onnxscript` is missing.
        ValueError: as `classifier_of`.
    """
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ImportError(
            "format='onnx' needs the package onnxscript: pip install 'flagembedding_matryoshka[onnx]'"
        ) from error
    classifier = classifier_of(exit, allow_uncapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and onnxscript about themselves
        program: Any = torch.onnx.export(
            Scores(classifier.model.float()),
            example_inputs(),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(),
            input_names=list(INPUTS),
            output_names=["logits"],
            verbose=False,
        )
    remove_written(directory)
    write_files(classifier, directory, "onnx")
    folder = Path(directory, "onnx")
    folder.mkdir(exist_ok=True)
    program.save(str(folder / "model.onnx"), external_data=True)
