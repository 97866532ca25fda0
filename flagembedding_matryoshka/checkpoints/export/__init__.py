"""Export of layer-wise checkpoints, and of single exits for other runtimes.

Formats are `layerwise` (this package), `plain` (transformers, sentence-transformers, vLLM), `onnx`, `openvino` and
`gguf` (llama.cpp).
"""

from flagembedding_matryoshka.checkpoints.export.layerwise import (
    ACTIVATIONS,
    MERGED,
    SENTENCE_TRANSFORMERS_FILE,
    WRITTEN,
    export_exits,
    remove_written,
    write_lengths,
    write_sentence_transformers_files,
)

__all__ = [
    "ACTIVATIONS",
    "MERGED",
    "SENTENCE_TRANSFORMERS_FILE",
    "WRITTEN",
    "export_exits",
    "remove_written",
    "write_lengths",
    "write_sentence_transformers_files",
]
