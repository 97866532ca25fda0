import logging
import math

import pytest

from flagembedding_matryoshka.finetune.collapse import (
    IN_A_ROW,
    PATIENCE,
    CollapseGuard,
    ExitState,
    TrainingCollapsedError,
)

CHANCE = math.log(8)
AT_CHANCE, LEARNT = ExitState(2 * CHANCE, 0.3, CHANCE), ExitState(2.0, 3.0, 1.2)
LATE = 10 + PATIENCE


def guard(**options):
    return CollapseGuard(group_size=8, warmup_steps=10, **options)


def test_an_exit_that_stays_at_chance_is_named_once(caplog):
    watched = guard(stop=True)
    with caplog.at_level(logging.WARNING):
        (message,) = watched.check(LATE, {3: AT_CHANCE, 6: LEARNT, 9: LEARNT})
        assert "exits [3] rank at chance, other exits do not" in message and "--exits" in message
        (message,) = watched.check(LATE + 1, {3: AT_CHANCE, 6: AT_CHANCE, 9: LEARNT})
        assert "exits [6]" in message
        assert watched.check(LATE + 2, {3: AT_CHANCE, 6: AT_CHANCE, 9: LEARNT}) == []
    assert len(caplog.records) == 2


def test_nothing_is_expected_at_first_nor_of_a_loss_that_has_left():
    assert guard(stop=True).check(LATE - 1, {3: AT_CHANCE}) == []
    assert guard(stop=True).check(LATE, {3: ExitState(1.0, 1.0, 0.9 * CHANCE)}) == []


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (AT_CHANCE, r"every exit ranks at chance: the loss is still ln\(group\) = 2\.08.*--random_negatives"),
        (
            ExitState(0.1, 0.001, None),
            r"every exit gives equal scores: their standard deviation .* at most 0\.001.*--learning_rate",
        ),
    ],
)
def test_where_all_exits_say_nothing_the_run_can_be_stopped(state, reason, caplog):
    watched = guard()
    (message,) = watched.check(LATE, {3: state, 6: state})
    assert watched.check(LATE + 1, {3: state, 6: state}) == []
    assert message in caplog.text
    with pytest.raises(TrainingCollapsedError, match=rf"--stop_on_collapse: after {LATE} steps {reason}"):
        guard(stop=True).check(LATE, {3: state, 6: state})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_told_at_once(value):
    exits = {3: LEARNT, 6: ExitState(value, 1.0, 1.0)}
    (message,) = guard().check(1, exits)
    assert "After 1 steps the loss of the exits [6] is not finite" in message and "--bf16" in message
    with pytest.raises(TrainingCollapsedError):
        guard(stop=True).check(1, exits)


@pytest.mark.parametrize("large", [1000.0, math.inf, math.nan])
def test_gradients_explode_when_they_stay_large(large):
    watched = guard()
    norms = [1.0, 2.0, 1.5, large, 1.0, *[large] * (IN_A_ROW + 1)]
    told = [watched.check(step, {3: LEARNT}, norm) for step, norm in enumerate(norms)]
    assert [len(messages) for messages in told] == [0] * (4 + IN_A_ROW) + [1, 0]
    assert "and 1.25 before. Lower --learning_rate" in told[-2][0]


def test_the_scale_that_float16_seeks_at_first_is_no_explosion():
    watched = guard(stop=True)
    assert [watched.check(step, {3: LEARNT}, norm) for step, norm in enumerate([math.inf] * 9 + [1.0])] == [[]] * 10
