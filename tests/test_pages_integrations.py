"""The output that docs/integrations.md shows."""

import pytest

from tests.pages import blocks
from tests.shipped import needs_smollm2

PAGE = "docs/integrations.md"


@needs_smollm2
def test_the_first_block_prints_the_scores_of_the_page(capsys):
    exec(compile(blocks(PAGE, "python")[0], PAGE, "exec"), {})
    printed, shown = (
        [[float(number) for number in line.split()] for line in text.splitlines()]
        for text in (capsys.readouterr().out, blocks(PAGE, "text")[0])
    )
    assert len(printed) == len(shown) == 4
    for numbers, expected in zip(printed, shown, strict=True):
        assert numbers == pytest.approx(expected, abs=0.02)
