import logging
import math

from flagembedding_matryoshka.finetune.chance import PATIENCE, ChanceGuard

CHANCE = math.log(8)


def test_an_exit_that_stays_at_chance_is_named_once(caplog):
    guard = ChanceGuard(group_size=8, warmup_steps=10)
    with caplog.at_level(logging.WARNING):
        assert guard.check(10 + PATIENCE, {3: CHANCE, 6: 1.2}) == [3]
        assert guard.check(20 + PATIENCE, {3: CHANCE, 6: CHANCE}) == [6]
        assert guard.check(30 + PATIENCE, {3: CHANCE, 6: CHANCE}) == []
    assert [record.args[1] for record in caplog.records] == [[3], [6]]
    assert "--random_negatives" in caplog.text


def test_nothing_is_expected_at_first_nor_of_a_loss_that_has_left():
    guard = ChanceGuard(group_size=8, warmup_steps=10)
    assert guard.check(9 + PATIENCE, {3: CHANCE}) == []
    assert guard.check(10 + PATIENCE, {3: 0.9 * CHANCE}) == []
