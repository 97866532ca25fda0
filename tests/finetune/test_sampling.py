import random
from collections import Counter

import pytest

from flagembedding_matryoshka import CostWiseMistralConfig
from flagembedding_matryoshka.finetune.sampling import sample_setting

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
