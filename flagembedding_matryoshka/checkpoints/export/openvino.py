"""One exit in OpenVINO's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flagembedding_matryoshka.checkpoints.export.graph import INPUTS, OUTPUT, Scores, example_inputs, write_graph
from flagembedding_matryoshka.checkpoints.export.plain import Classifier, Exit, classifier_of, package_of
from flagembedding_matryoshka.checkpoints.export.sample import SAMPLE

OPENVINO_PRECISIONS = ("f32", "bf16", "int8")


def export_openvino(
    exit: Exit,
    directory: str | Path,
    precision: str = "f32",
    sample: Sequence[tuple[str, str]] | None = None,
    allow_uncapped: bool = False,
) -> None:
    """Write an exit to `openvino/openvino_model.xml`, with tokenizer and configuration. Batch and length are free.

    Args:
        precision: "f32" and "bf16" store matrices in this format. "int8" multiplies matrices of 8-bit integers: nncf
            measures the ranges of their inputs and moves outliers into the weights (SmoothQuant, arXiv 2211.10438).
        sample: pairs of query and document on which nncf measures ranges for "int8". None is `SAMPLE`.
        allow_uncapped: as in `classifier_of`.

    Raises:
        ImportError: if the package `openvino` is missing, or for int8 `nncf`.
        ValueError: as `classifier_of`.
    """
    with package_of("openvino"):
        import openvino

        if precision == "int8":
            import nncf
    classifier = classifier_of(exit, allow_uncapped)
    # OpenVINO's fused attention makes NaN of a padding token whose window holds padding alone.
    classifier.model.float().set_attn_implementation("eager")

    def convert(scores: Scores) -> Any:
        model = openvino.convert_model(
            scores,
            example_input=dict(zip(INPUTS, example_inputs(), strict=True)),
            input={name: ([-1, -1], openvino.Type.i64) for name in INPUTS},
        )
        model.outputs[0].set_names({OUTPUT})
        if precision == "bf16":
            _round_matrices(model, openvino)
        if precision != "int8":
            return model
        batches = tokens_of(classifier, SAMPLE if sample is None else sample)
        kind = nncf.ModelType.TRANSFORMER
        return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), model_type=kind)

    def save(model: Any, path: str) -> None:
        openvino.save_model(model, path, compress_to_fp16=False)

    write_graph(classifier, directory, "openvino", "openvino_model.xml", convert, save)


def _round_matrices(model: Any, openvino: Any) -> None:
    """Store matrices in bfloat16. The graph stays in float32, so that the runtime chooses the dtype of computation."""
    for constant in model.get_ops():
        is_float = constant.get_type_name() == "Constant" and constant.get_element_type() == openvino.Type.f32
        if is_float and len(constant.shape) == 2:
            rounded = torch.from_numpy(constant.data.copy()).bfloat16().float().numpy()
            stored = openvino.opset13.constant(rounded, openvino.Type.bf16)
            constant.output(0).replace(openvino.opset13.convert(stored, "f32").output(0))


def tokens_of(classifier: Classifier, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the inputs of each pair without padding, (1, length) int64 arrays."""
    batches = []
    for query, document in pairs:
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        options: dict[str, Any] = {"return_tensors": "np", "return_dict": True, "truncation": True}
        batch: Any = classifier.tokenizer.apply_chat_template(messages, max_length=classifier.max_length, **options)
        batches.append({name: batch[name] for name in INPUTS})
    return batches
