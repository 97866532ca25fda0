"""A trained Mistral small enough for tests that need one which ranks."""

from pathlib import Path

TINY_BASE = str(Path(__file__).parent)
"""6 layers, 192 wide, 3.4 million weights in float16. The recipe beside it wrote them, from docstrings alone: a lexical
matcher put into the first three layers, then 800 steps of training. It ranks docstrings a little below BM25."""
