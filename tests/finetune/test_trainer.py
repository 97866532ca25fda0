import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from flagembedding_matryoshka import CostWiseMistralConfig, Setting
from flagembedding_matryoshka.finetune.data import PADDING
from flagembedding_matryoshka.finetune.trainer import TrainingCost, ranking_metrics
from flagembedding_matryoshka.models.batch import PackedBatch
from flagembedding_matryoshka.models.flops import estimate_flops

CONFIG = CostWiseMistralConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    layer_wise=True, start_layer=2,
)  # fmt: skip
EXITS = tuple(CONFIG.exit_layers)
WIDE, NARROW = Setting(EXITS), Setting(EXITS, (3,), 2)
LENGTHS = torch.tensor([10, 12, 9, 14])
QUERY = torch.tensor([3, 3, 4, 4])
PARTS = (QUERY, LENGTHS - QUERY - 2, torch.full((4,), 2))
# the same with each query as a segment of its own in front of its two pairs
PACKED = PackedBatch(
    torch.tensor([3, 0, 0, 4, 0, 0]),
    torch.tensor([0, 5, 7, 0, 3, 8]),
    torch.tensor([0, 2, 2, 0, 2, 2]),
    torch.device("cpu"),
    torch.tensor([-1, 0, 0, -1, 3, 3]),
)
SHARED = torch.tensor([False, True, False, True])


def flops(setting, **options):
    return estimate_flops(CONFIG, setting, *PARTS, SHARED, **options, read_alone=(setting.depth,))


@pytest.mark.parametrize(("all_weights", "passes"), [(False, 2), (True, 3)])
def test_a_pass_and_its_gradients(all_weights, passes):
    cost = TrainingCost(CONFIG, all_weights, full_width_teacher=True)
    cost.add(PACKED, 2, WIDE)
    cost.add(PACKED, 2, WIDE)
    counts = cost.counts(torch.device("cpu"))
    assert counts.tolist() == [4, 2 * int(LENGTHS.sum()), 2 * passes * flops(WIDE)]


def test_the_teaching_pass_begins_where_the_passage_is_compressed():
    cost, plain = (TrainingCost(CONFIG, False, full_width_teacher=itself) for itself in (True, False))
    for counter in (cost, plain):
        counter.add(PACKED, 2, NARROW)
    # What is left is as many layers as a re-ranker of half the depth has.
    assert plain.operations == 2 * flops(NARROW)
    assert cost.operations - plain.operations == flops(Setting((3,)))


def test_exits_up_to_a_store_layer_are_a_pass_of_their_own():
    cost = TrainingCost(CONFIG, False, full_width_teacher=False)
    stored = Setting((5, 6), (4,), 2, store_layer=4)
    cost.add(PACKED, 2, stored)
    assert cost.operations == 2 * (flops(stored) + flops(Setting((2, 3, 4))))
    assert flops(stored) < flops(Setting((5, 6), (4,), 2))


def test_a_resumed_run_counts_on():
    cost = TrainingCost(CONFIG, False, full_width_teacher=False)
    cost.add(PACKED, 2, WIDE)
    counts = cost.counts(torch.device("cpu"))
    history = [{"loss": 1.0, "lists": 7.0, "tokens": 100.0, "operations": 5.0, "seconds": 60.0}, {"eval_MRR@10": 0.5}]
    totals = cost.totals(history, counts)
    assert totals["lists"] == 9 and totals["tokens"] == 145 and totals["seconds"] >= 60
    assert cost.totals([], counts)["lists"] == 2


# Two lists, of three passages and of two; the relevant one is first, and second.
LABELS = np.array([[1, 0, 0], [0, 1, PADDING]])


def test_every_exit_is_measured_for_itself():
    right = [[3.0, 1.0, 2.0], [0.0, 1.0, PADDING]]
    wrong = [[1.0, 3.0, 2.0], [1.0, 0.0, PADDING]]
    scores = np.array([right, wrong]).transpose(1, 2, 0)
    metrics = ranking_metrics(EvalPrediction(scores, LABELS), exits=[4, 8])
    assert metrics["layer_4_MRR@10"] == metrics["layer_4_nDCG@10"] == 1.0
    assert metrics["layer_8_MRR@10"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert metrics["layer_8_nDCG@10"] == pytest.approx((1 / math.log2(4) + 1 / math.log2(3)) / 2)
    assert metrics["MRR@10"] == pytest.approx((1 + metrics["layer_8_MRR@10"]) / 2)


def test_what_stands_behind_a_list_is_not_ranked():
    scores = np.array([[3.0, 1.0, 2.0], [-300.0, -200.0, PADDING]])[..., None]
    assert ranking_metrics(EvalPrediction(scores, LABELS), exits=[4])["layer_4_MRR@10"] == 1.0


def test_a_relevant_passage_below_the_tenth_place_counts_nothing():
    labels = np.array([[0] * 10 + [1]])
    scores = -np.arange(11.0)[None, :, None]
    metrics = ranking_metrics(EvalPrediction(scores, labels), exits=[4])
    assert metrics["layer_4_MRR@10"] == metrics["layer_4_nDCG@10"] == 0.0


def test_a_model_with_one_score_for_all_passages_ranks_worst():
    scores = np.zeros((2, 3, 1))
    metrics = ranking_metrics(EvalPrediction(scores, LABELS), exits=[4])
    assert metrics["MRR@10"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert metrics["nDCG@10"] == pytest.approx((1 / math.log2(4) + 1 / math.log2(3)) / 2)


def test_a_nan_score_is_named():
    scores = np.zeros((2, 3, 2))
    scores[1, 2] = np.nan  # behind the list
    ranking_metrics(EvalPrediction(scores, LABELS), exits=[4, 8])
    scores[1, :2, 1] = np.nan
    with pytest.raises(ValueError, match=r"passage 0 of query 1 .* has the score NaN at layer 8, and 1 more scores"):
        ranking_metrics(EvalPrediction(scores, LABELS), exits=[4, 8])
