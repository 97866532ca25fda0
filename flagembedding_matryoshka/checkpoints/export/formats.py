"""Formats of single exits for other runtimes. A module writes each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from flagembedding_matryoshka.checkpoints.export.gguf import GGUF_PRECISIONS, export_gguf
from flagembedding_matryoshka.checkpoints.export.onnx import export_onnx
from flagembedding_matryoshka.checkpoints.export.openvino import OPENVINO_PRECISIONS, export_openvino
from flagembedding_matryoshka.checkpoints.export.plain import Exit, export_transformers

Format = Literal["layerwise", "transformers", "onnx", "openvino", "gguf"]
PRECISIONS = {"openvino": OPENVINO_PRECISIONS, "gguf": GGUF_PRECISIONS}


def export_formats(
    exits: Sequence[Exit],
    output_dir: str | Path,
    format: Format,
    precision: str | None,
    sample: Sequence[tuple[str, str]] | None,
    allow_uncapped: bool,
) -> None:
    """Write exits for another runtime: one to `output_dir`, several to its folders `exit-9`, `exit-12`, ….

    Args:
        format, precision, sample, allow_uncapped: as in `MatryoshkaReranker.export`.

    Raises:
        ImportError: if a package is missing that the format needs, with the line that installs it.
        ValueError: if there is no such format or precision, or as `classifier_of`.
    """
    if format not in get_args(Format):
        raise ValueError(f"format is {format!r}, but must be one of {', '.join(get_args(Format))}.")
    allowed: tuple[str, ...] = PRECISIONS.get(format, ())
    if precision is not None and precision not in allowed:
        raise ValueError(f"precision={precision!r}, but format={format!r} takes {', '.join(allowed) or 'none'}.")
    if sample is not None and precision != "int8":
        raise ValueError(f"sample={len(sample)} pairs, but precision={precision!r}: only 'int8' measures ranges.")
    chosen = precision or next(iter(allowed), "")
    writers: dict[str, Callable[..., None]] = {
        "transformers": export_transformers,
        "onnx": export_onnx,
        "openvino": partial(export_openvino, precision=chosen, sample=sample),
        "gguf": partial(export_gguf, precision=chosen),
    }
    for exit in exits:
        directory = Path(output_dir) if len(exits) == 1 else Path(output_dir, f"exit-{exit.layer}")
        writers[format](exit, directory, allow_uncapped=allow_uncapped)
