import math

import numpy as np
import pytest
from transformers import EvalPrediction

from flagembedding_matryoshka.finetune.data import PADDING
from flagembedding_matryoshka.finetune.trainer import ranking_metrics

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
