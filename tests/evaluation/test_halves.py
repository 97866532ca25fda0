import logging

import hypothesis.strategies as st
import pytest
from hypothesis import given

from flagembedding_matryoshka.evaluation.halves import Halves, at, chooses

ids = st.lists(st.integers(0, 9999).map(str), unique=True, max_size=40)


@given(ids)
def test_every_query_is_in_one_half(queries):
    halves = Halves.of(queries)
    assert sorted(halves.choosing + halves.held_out) == list(range(len(queries)))
    assert all(chooses(query) for query in at(queries, halves.choosing))
    assert not any(chooses(query) for query in at(queries, halves.held_out))


@given(ids, st.data())
def test_a_query_stays_in_its_half_whatever_is_sampled_with_it(queries, data):
    some = data.draw(st.lists(st.sampled_from(queries), unique=True)) if queries else []
    assert set(at(some, Halves.of(some).choosing)) <= set(at(queries, Halves.of(queries).choosing))


def test_they_are_about_equal():
    assert 460 < len(Halves.of(map(str, range(1000))).choosing) < 540


def test_few_queries_are_warned_of_and_none_are_refused(caplog):
    with caplog.at_level(logging.WARNING):
        Halves(tuple(range(25)), tuple(range(25, 50))).check()
        assert not caplog.records
        Halves((0, 1), (2,)).check()
    assert "2 queries choose and 1 are held out: with fewer than 25" in caplog.text
    for halves in (Halves((0,), ()), Halves((), (0,))):
        with pytest.raises(ValueError, match="by the hashes of their ids: a plan needs some of both"):
            halves.check()
