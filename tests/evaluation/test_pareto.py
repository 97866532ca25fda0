import hypothesis.strategies as st
from hypothesis import given

from flagembedding_matryoshka.evaluation.pareto import pareto_front

points = st.lists(st.tuples(st.integers(1, 6).map(float), st.integers(-3, 3).map(float)), min_size=1, max_size=20)


def dominates(one, other):
    return one[0] <= other[0] and one[1] >= other[1] and one != other


@given(points)
def test_equals_asking_every_pair(points):
    assert pareto_front(points) == [not any(dominates(other, point) for other in points) for point in points]


def test_equal_points_are_on_it_together():
    assert pareto_front([(1.0, 0.5), (1.0, 0.5), (2.0, 0.5), (0.5, 0.1)]) == [True, True, False, True]
