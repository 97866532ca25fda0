import pickle

import pytest

from flagembedding_matryoshka.integrations.adapter import RankingAdapter
from flagembedding_matryoshka.integrations.ranking import Ranking


def test_the_first_name_is_the_same_class():
    assert Ranking is RankingAdapter


def test_an_adapter_of_a_path_is_pickled_as_its_arguments(other_path):
    adapter = RankingAdapter(**other_path, cascade={"3": 0.5}, min_score=0.25, normalize="calibrated")
    again = pickle.loads(pickle.dumps(adapter))
    assert (
        again.arguments()
        == adapter.arguments()
        == {
            **other_path,
            "cascade": {3: 0.5},
            "normalize": "calibrated",
            "score_threshold": 0.25,
        }
    )


def test_an_unknown_option_is_refused_with_those_that_are_allowed():
    with pytest.raises(TypeError, match=r"unknown arguments \['cutof_layers'\]: allowed are \['allow_pickle', "):
        RankingAdapter("path", cutof_layers=3)
