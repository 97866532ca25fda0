import shutil

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from tests.batches import WIDTHS, close


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_score_the_same(tiny_layerwise_path):
    plain, compiled = (
        MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", compile=compile)
        for compile in (False, True)
    )
    pairs = [("a wing", "air flows over a wing " * (number % 5)) for number in range(11)]
    for width in WIDTHS:
        scores = [
            torch.tensor(each.compute_score(pairs, cutoff_layers=each.config.exit_layers, batch_size=3, **width))
            for each in (plain, compiled)
        ]
        close(*scores)
    torch._dynamo.reset()
