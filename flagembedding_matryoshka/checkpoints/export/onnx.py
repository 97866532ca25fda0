"""One exit in ONNX, for onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flagembedding_matryoshka.checkpoints.export.graph import INPUTS, OUTPUT, Scores, example_inputs, write_graph
from flagembedding_matryoshka.checkpoints.export.plain import Exit, classifier_of, package_of


def export_onnx(exit: Exit, directory: str | Path, allow_uncapped: bool = False) -> None:
    """Write an exit in float32 to `onnx/model.onnx`, with tokenizer and configuration. Batch and length are free.

    Args:
        allow_uncapped: as in `classifier_of`.

    Raises:
        ImportError: if the package `onnxscript` is missing.
        ValueError: as `classifier_of`.
    """
    with package_of("onnx"):
        import onnxscript  # noqa: F401 - torch.onnx needs it
    classifier = classifier_of(exit, allow_uncapped)
    classifier.model.float()
    write_graph(
        classifier, directory, "onnx", "model.onnx", _convert, lambda graph, path: graph.save(path, external_data=True)
    )


def _convert(scores: Scores) -> Any:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    return torch.onnx.export(
        scores,
        example_inputs(),
        dynamo=True,
        dynamic_shapes={name: {0: batch, 1: length} for name in INPUTS},
        input_names=list(INPUTS),
        output_names=[OUTPUT],
        verbose=False,
    )
