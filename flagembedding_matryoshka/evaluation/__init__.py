"""Measurement of quality and cost of depths, widths and cascades: `python -m flagembedding_matryoshka.evaluation …`."""
