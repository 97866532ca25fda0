import json
import shutil

import pytest
import torch
import widen
from peft import PeftConfig

from flagembedding_matryoshka import MatryoshkaReranker
from tests.examples.smollm2.test_write import OPTIONS, PAIRS
from tests.shipped import EXITS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_higher_rank_and_more_exits_change_no_score(checkpoint, tmp_path):
    rank, output = PeftConfig.from_pretrained(checkpoint).r + 4, tmp_path / "wide"
    added = next(layer for layer in range(1, EXITS[-1]) if layer not in EXITS)
    widen.widen(checkpoint, output, rank, [added, *EXITS])
    assert PeftConfig.from_pretrained(output).r == rank
    before, after = (MatryoshkaReranker(str(path), **OPTIONS) for path in (checkpoint, output))
    for width in ({}, {"compress_layers": [1], "compress_ratio": 2}):
        expected, actual = (
            torch.tensor(model.compute_score(PAIRS, cutoff_layers=EXITS, **width)) for model in (before, after)
        )
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert after.config.exit_layers == sorted({added, *EXITS})
    after.compute_score(PAIRS, cutoff_layers=[added])


@pytest.mark.parametrize(
    ("rank", "exits", "said"), [(1, EXITS, "rank 1 is lower"), (64, EXITS[:-1], "must contain"), (64, [99], "end with")]
)
def test_lower_ranks_and_missing_exits_are_refused(checkpoint, tmp_path, rank, exits, said):
    with pytest.raises(ValueError, match=said):
        widen.widen(checkpoint, tmp_path / "wide", rank, [*exits])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_alpha": 9}, "rank 7 changes the scale .* multiple of 4"),
        ({"modules_to_save": ["embed_tokens"]}, "whole"),
    ],
)
def test_adapters_that_cannot_be_widened_are_refused(checkpoint, tmp_path, changed, said):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "adapter_config.json").read_text()) | {"r": 4} | changed
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        widen.widen(copy, tmp_path / "wide", 7, EXITS)
