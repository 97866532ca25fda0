import json
import random
from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler

from flagembedding_matryoshka import CostWiseMistralConfig
from flagembedding_matryoshka.finetune import MatryoshkaDataArguments
from flagembedding_matryoshka.finetune.data import MatryoshkaTrainDataset
from flagembedding_matryoshka.finetune.sampling import BalancedSampler, OneSourceSampler, distribute, sample_setting

CONFIG = CostWiseMistralConfig(num_hidden_layers=8, layer_wise=True, start_layer=2)
LAYERS, RATIOS, STEPS = [2, 4, 6], [1, 2, 4, 8], 4000


def sample(step, seed=0, ratios=RATIOS):
    return sample_setting(CONFIG, LAYERS, ratios, seed, step)


def test_a_function_of_seed_and_step_alone():
    state = random.getstate()
    draws = [sample(step) for step in range(20)]
    assert random.getstate() == state
    random.random()
    assert [sample(step) for step in range(20)] == draws
    assert [sample(step, seed=1) for step in range(20)] != draws


def test_draws_are_those_of_earlier_runs_that_are_resumed():
    expected = [(4, (4,)), (2, (2, 6)), (4, (2,)), (4, (2, 4)), (2, (2,)), (1, ())]
    assert [(draw.compress_ratio, draw.compress_layers) for draw in map(sample, range(6))] == expected
    assert not any(sample(step).store_layer for step in range(20))


def test_every_exit_is_scored():
    assert sample(0).cutoff_layers == tuple(range(2, 9))


def test_each_layer_is_on_half_of_the_time_and_ratios_are_uniform():
    draws = [sample(step, ratios=[2, 4, 8]) for step in range(STEPS)]
    for layer in LAYERS:
        assert sum(layer in draw.compress_layers for draw in draws) / STEPS == pytest.approx(0.5, abs=0.03)
    on = [draw.compress_ratio for draw in draws if draw.compress_layers]
    assert len(on) / STEPS == pytest.approx(1 - 0.5 ** len(LAYERS), abs=0.03)
    for count in Counter(on).values():
        assert count / len(on) == pytest.approx(1 / 3, abs=0.03)


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"compress_layers \[9\] do not exist"):
        for step in range(20):
            sample_setting(CONFIG, [9], [2], 0, step)


STORES = [1, 3, 4]


def test_store_layers_are_drawn_uniformly_and_change_no_other_draw():
    draws = [sample_setting(CONFIG, LAYERS, RATIOS, 0, step, STORES) for step in range(STEPS)]
    counts = Counter(draw.store_layer for draw in draws)
    assert set(counts) == {0, *STORES}
    for count in counts.values():
        assert count / STEPS == pytest.approx(1 / 4, abs=0.03)
    for step, draw in enumerate(draws):
        plain, store = sample(step), draw.store_layer
        assert draw.cutoff_layers == tuple(layer for layer in plain.cutoff_layers if layer > store)
        if not store:
            assert draw == plain
        elif plain.compress_layers:
            above = [layer for layer in plain.compress_layers if layer > store]
            assert draw.compress_layers == (store, *above) and draw.compress_ratio == plain.compress_ratio
    assert {draw.compress_ratio for draw in draws if draw.store_layer and draw.compress_layers} == set(RATIOS)


def test_a_store_layer_without_an_exit_above_it_is_refused():
    with pytest.raises(ValueError, match=r"cutoff_layers \[8\] do not lie above store_layer=8"):
        for step in range(20):
            sample_setting(CONFIG, LAYERS, RATIOS, 0, step, [8])


ROWS, BATCH = 70, 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tiny_tokenizer):
    """Rows, each with passages of one length, from a few words to more than passage_max_len."""
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
    """For each process, the rows of its passes, as accelerate distributes them."""
    every = BatchSampler(sampler, BATCH, drop_last=True)
    return [list(BatchSamplerShard(every, processes, process)) for process in range(processes)]


def imbalance(shares, dataset):
    """The largest number of tokens of a process, relative to the mean of all processes; the mean over passes."""
    found = []
    for together in zip(*shares, strict=True):
        tokens = [sum(len(pair) for row in rows for pair in dataset[row][0]) for rows in together]
        found.append(max(tokens) * len(tokens) / sum(tokens))
    return sum(found) / len(found)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_step_has_the_rows_it_would_have_and_processes_get_as_much_of_them(dataset, processes, passes):
    sampler = BalancedSampler(dataset, SeedableRandomSampler(dataset, data_seed=7), BATCH, processes, passes)
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
    orders = [SeedableRandomSampler(dataset, data_seed=seed) for seed in (7, 7, 8)]
    first, again, other = (BalancedSampler(dataset, order, BATCH, 2) for order in orders)
    orders = []
    for epoch in (0, 1, 0):
        dataset.start_epoch(epoch)
        orders.append(list(first))
        assert list(again) == orders[-1]
    assert orders[0] == orders[2] != orders[1]
    assert list(other) != orders[0]


def test_every_share_is_as_long():
    draw = random.Random(0)
    for shares in (1, 2, 5):
        weights = [draw.random() for _ in range(4 * shares)]
        dealt = distribute(weights, shares)
        assert [len(share) for share in dealt] == [4] * shares
        assert sorted(place for share in dealt for place in share) == list(range(len(weights)))


def test_batches_are_of_one_file_and_the_rest_comes_last():
    files = [(0, 10), (10, 7), (17, 1)]
    sampler = OneSourceSampler(files, 3, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(18)) and list(sampler) == order
    batches = [order[start : start + 3] for start in range(0, 15, 3)]
    sources = [{next(place for place, (start, size) in enumerate(files) if row < start + size) for row in batch}
               for batch in batches]  # fmt: skip
    assert all(len(found) == 1 for found in sources) and set().union(*sources) == {0, 1}
    sampler.set_epoch(1)
    assert list(sampler) != order
