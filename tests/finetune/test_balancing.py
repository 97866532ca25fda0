import json
import random

import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler

from flagembedding_matryoshka.finetune import MatryoshkaDataArguments
from flagembedding_matryoshka.finetune.data import MatryoshkaTrainDataset
from flagembedding_matryoshka.finetune.sampling import BalancedSampler, distribute

ROWS, BATCH = 70, 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tiny_tokenizer):
    """Rows whose passages are of one length each, from a few words to more than are kept."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    draw = random.Random(0)
    rows = []
    for number in range(ROWS):
        length = draw.randrange(1, 120)
        rows.append({"query": f"q {number}", "pos": ["wing " * length], "neg": ["lift " * length]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = MatryoshkaDataArguments(train_data=[str(path)], cache_path=str(path.parent / "cache"), train_group_size=4)
    return MatryoshkaTrainDataset(args, tiny_tokenizer)


def batches(sampler, processes):
    """Of each process, the rows of its passes, as accelerate gives them out."""
    every = BatchSampler(sampler, BATCH, drop_last=True)
    return [list(BatchSamplerShard(every, processes, process)) for process in range(processes)]


def imbalance(shares, dataset):
    """The longest process's tokens over their mean, meant over all passes."""
    found = []
    for together in zip(*shares, strict=True):
        tokens = [sum(len(pair) for row in rows for pair in dataset[row][0]) for rows in together]
        found.append(max(tokens) * len(tokens) / sum(tokens))
    return sum(found) / len(found)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_step_has_the_rows_it_would_have_and_processes_get_as_much_of_them(dataset, processes, passes):
    sampler = BalancedSampler(dataset, 7, BATCH, processes, passes)
    plain = SeedableRandomSampler(dataset, data_seed=7)
    assert len(sampler) == ROWS
    step = processes * BATCH * passes
    balanced, drawn = list(sampler), list(plain)
    assert sorted(balanced) == list(range(ROWS))
    for start in range(0, ROWS, step):
        assert sorted(balanced[start : start + step]) == sorted(drawn[start : start + step])
    plain.set_epoch(0)
    before, after = (imbalance(batches(order, processes), dataset) for order in (plain, sampler))
    assert after - 1 < 0.6 * (before - 1)


def test_the_order_is_a_function_of_seed_and_epoch(dataset):
    first, again = (BalancedSampler(dataset, 7, BATCH, 2) for _ in range(2))
    orders = []
    for epoch in (0, 1, 0):
        dataset.start_epoch(epoch)
        orders.append(list(first))
        assert list(again) == orders[-1]
    assert orders[0] == orders[2] != orders[1]
    assert list(BalancedSampler(dataset, 8, BATCH, 2)) != orders[0]


def test_every_share_is_as_long():
    draw = random.Random(0)
    for shares in (1, 2, 5):
        weights = [draw.random() for _ in range(4 * shares)]
        dealt = distribute(weights, shares)
        assert [len(share) for share in dealt] == [4] * shares
        assert sorted(place for share in dealt for place in share) == list(range(len(weights)))
