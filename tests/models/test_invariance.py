import pytest
import torch
from torch import nn

from flagembedding_matryoshka.models.causal_lm import RowwiseLinear
from flagembedding_matryoshka.models.invariance import ROWS, TiledLinear, tile_linears

pytestmark = pytest.mark.usefixtures("one_thread")


def states(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, 2 * ROWS + 7])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_come_out_the_same_whatever_is_beside_them(rows, bias):
    linear = nn.Linear(96, 40, bias=bias, dtype=torch.bfloat16)
    inputs = states(1, rows, 96)
    expected = linear(inputs)
    tile_linears(nn.ModuleList([linear]))
    assert type(linear) is TiledLinear
    output = linear(inputs)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected)
    shifted = linear(torch.cat([states(1, 3, 96), inputs], dim=1))[:, 3:]
    alone = torch.stack([linear(row) for row in inputs[0, ::50, None]])
    assert torch.equal(shifted, output) and torch.equal(alone[:, 0], output[0, ::50])


@pytest.mark.parametrize("hidden", [32, 576])
def test_a_head_sums_each_row_by_itself(hidden):
    head = RowwiseLinear(hidden, 1, bias=False)
    inputs = states(65, hidden).float()
    learnt = head(inputs)
    assert torch.autograd.grad(learnt.sum(), head.weight)[0].allclose(inputs.sum(0), atol=1e-4)
    with torch.no_grad():
        scores = head(inputs)
        parts = [(place, head(inputs[place : place + size])) for size in (1, 7) for place in range(0, 58, 3)]
    torch.testing.assert_close(scores, learnt)
    assert all(torch.equal(part, scores[place : place + len(part)]) for place, part in parts)
