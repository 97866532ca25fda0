"""One exit in OpenVINO's format."""

from __future__ import annotations

import warnings
from pathlib import Path

from flagembedding_matryoshka.checkpoints.export.layerwise import remove_written
from flagembedding_matryoshka.checkpoints.export.onnx import INPUTS, Scores, example_inputs
from flagembedding_matryoshka.checkpoints.export.plain import Exit, classifier_of, write_files


def export_openvino(exit: Exit, directory: str | Path, allow_uncapped: bool = False) -> None:
    """Write an exit in float32 to `openvino/openvino_model.xml`, with tokenizer and configuration.

    Batch and length are free.

    Args:
        allow_uncapped: as of `classifier_of`.

    Raises:
        ImportError: if the package `openvino` is missing.
        ValueError: as `classifier_of`.
    """
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            "format='openvino' needs the package openvino: pip install 'flagembedding_matryoshka[openvino]'"
        ) from error
    classifier = classifier_of(exit, allow_uncapped)
    # OpenVINO's fused attention makes NaN of a padding token whose window holds padding alone.
    classifier.model.float().set_attn_implementation("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(
            Scores(classifier.model),
            example_input=dict(zip(INPUTS, example_inputs(), strict=True)),
            input={name: ([-1, -1], openvino.Type.i64) for name in INPUTS},
        )
    model.outputs[0].set_names({"logits"})
    remove_written(directory)
    write_files(classifier, directory, "openvino")
    folder = Path(directory, "openvino")
    folder.mkdir(exist_ok=True)
    openvino.save_model(model, str(folder / "openvino_model.xml"), compress_to_fp16=False)
