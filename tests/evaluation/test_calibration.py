import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.special import expit

pytest.importorskip("sklearn")
from sklearn.metrics import brier_score_loss, log_loss

from flagembedding_matryoshka.evaluation.calibration import (
    BINS,
    MIN_RELEVANT,
    Judgements,
    ProbabilityErrors,
    calibrate,
    check_calibration,
    expected_calibration_error,
    fit,
    fit_isotonic,
    fit_platt,
    judgements_of,
)
from flagembedding_matryoshka.evaluation.candidates import Candidates, Halves
from flagembedding_matryoshka.inference.calibration import Isotonic, Platt
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.collections import Collection


def drawn(probability, queries=60, candidates=20, seed=0):
    """Candidates whose relevance has a probability that depends on their score."""
    draw = np.random.default_rng(seed)
    scores = draw.normal(0, 3, queries * candidates)
    relevant = draw.random(len(scores)) < probability(scores)
    return Judgements(scores, relevant, np.repeat(np.arange(queries), candidates))


labels = st.lists(st.tuples(st.floats(-20, 20), st.booleans()), min_size=2, max_size=20)


@settings(max_examples=15)
@given(labels)
def test_maps_rise_whatever_they_are_fitted_to(rows):
    scores, relevant = np.array([score for score, _ in rows]), np.array([label for _, label in rows])
    for method in (fit_platt, fit_isotonic):
        found = method(scores, relevant)(torch.linspace(-30, 30, 200))
        assert bool((found.diff() >= -1e-12).all() and (found >= 0).all() and (found <= 1).all())


def test_platt_finds_the_sigmoid_that_the_labels_were_drawn_from():
    data = drawn(lambda scores: expit(0.7 * scores - 1.5), queries=400)
    found = fit_platt(data.scores, data.relevant)
    assert found.slope == pytest.approx(0.7, abs=0.05) and found.intercept == pytest.approx(-1.5, abs=0.1)
    shifted = fit_platt(2 * data.scores + 5, data.relevant)
    scores = torch.from_numpy(data.scores)
    torch.testing.assert_close(shifted(2 * scores + 5), found(scores), atol=1e-4, rtol=0)


def test_scores_that_fall_with_relevance_become_its_share():
    data = drawn(lambda scores: expit(-scores))
    found = fit_platt(data.scores, data.relevant)
    assert found.slope == 0 and found(torch.zeros(1)).item() == pytest.approx(data.relevant.mean(), abs=0.01)


@pytest.mark.parametrize(
    ("probability", "kind"),
    [
        (lambda scores: expit(scores - 1), Platt),
        (lambda scores: np.where(scores > 2, 0.9, np.where(scores > -2, 0.4, 0.35)), Isotonic),
    ],
)
def test_what_generalises_is_taken(probability, kind):
    assert isinstance(fit(drawn(probability, queries=200)), kind)


def test_a_single_query_has_nothing_to_be_held_out():
    assert isinstance(fit(drawn(expit, queries=1)), Platt)


def test_few_relevant_candidates_get_a_sigmoid():
    data = drawn(lambda scores: np.where(scores > 2, 0.9, np.where(scores > -2, 0.4, 0.35)), queries=200)
    assert isinstance(fit(data), Isotonic)
    few = data.relevant & (np.cumsum(data.relevant) < MIN_RELEVANT)
    assert isinstance(fit(Judgements(data.scores, few, data.queries)), Platt)
    # All relevant candidates above all others: steps would fit best.
    scores = np.tile(np.linspace(-1, 1, 20), 20)
    best = Judgements(scores, scores > 0.85, np.repeat(np.arange(20), 20))
    assert best.relevant.sum() < MIN_RELEVANT and isinstance(fit(best), Platt)


def test_isotonic_probabilities_are_never_certain():
    found = fit_isotonic(np.arange(8.0), np.arange(8) > 3)
    assert found(torch.tensor([-9.0, 0.0, 7.0, 99.0])).tolist() == pytest.approx([0.1, 0.1, 0.9, 0.9])


def test_the_error_is_that_of_the_bins():
    draw = np.random.default_rng(1)
    data = Judgements(np.zeros(40 * BINS), draw.random(40 * BINS) < 0.3, np.zeros(40 * BINS, dtype=int))
    values = draw.random(40 * BINS) ** 4
    parts = np.argsort(values).reshape(BINS, 40)  # equal mass
    expected = np.mean([abs(data.relevant[part].mean() - values[part].mean()) for part in parts])
    assert expected_calibration_error(torch.from_numpy(values), data) == pytest.approx(expected)
    exact = torch.from_numpy(data.relevant.astype(float))
    assert expected_calibration_error(exact, data) == 0
    assert expected_calibration_error(1 - exact, data) == 1
    # Equal probabilities are in one bin: their order does not matter.
    constant = torch.full((40 * BINS,), 0.25, dtype=torch.float64)
    assert expected_calibration_error(constant, data) == pytest.approx(abs(data.relevant.mean() - 0.25))


def test_brier_score_and_log_loss_are_those_of_sklearn():
    draw = np.random.default_rng(2)
    data = Judgements(np.zeros(300), draw.random(300) < 0.4, np.zeros(300, dtype=int))
    values = draw.random(300)
    found = ProbabilityErrors.of(torch.from_numpy(values), data)
    assert found.brier_score == pytest.approx(brier_score_loss(data.relevant, values))
    assert found.log_loss == pytest.approx(log_loss(data.relevant, values))
    certain = ProbabilityErrors.of(torch.from_numpy(1.0 - data.relevant), data)
    assert certain.brier_score == 1 and 30 < certain.log_loss < 40  # not infinite


def test_a_constant_wins_by_calibration_error_alone():
    """Scores that tell relevant candidates, and are shifted: the base rate is better calibrated than their sigmoid."""
    candidates, run = collection_of(drawn(lambda scores: expit(2 * scores - 1), queries=120))
    (found,) = calibrate({Setting(6): run}, candidates, Halves.of(candidates.passages))
    sigmoid, calibrated, base_rate = (found.errors[name] for name in ("sigmoid", "calibrated", "base_rate"))
    assert base_rate.expected_calibration_error < sigmoid.expected_calibration_error
    for name in ("brier_score", "log_loss"):
        assert getattr(calibrated, name) < getattr(sigmoid, name) < getattr(base_rate, name)


def collection_of(data):
    """Candidates and a run. All relevant passages are judged, the others are not."""
    names = [f"p{number}" for number in range(len(data.scores))]
    run, relevant = {}, {}
    for name, score, is_relevant, query in zip(names, data.scores, data.relevant, data.queries, strict=True):
        run.setdefault(f"q{query}", {})[name] = score
        relevant.setdefault(f"q{query}", {}).update({name: 1} if is_relevant else {})
    collection = Collection(dict.fromkeys(names, ""), dict.fromkeys(run, ""), relevant)
    return Candidates(collection, {query: list(scores) for query, scores in run.items()}, "mine"), run


def test_each_setting_is_calibrated_and_the_other_half_confirms_it():
    data = drawn(lambda scores: expit(scores - 4), queries=120)
    candidates, run = collection_of(data)
    stretched = {query: {name: 5 * score for name, score in scores.items()} for query, scores in run.items()}
    runs = {Setting(6): run, Setting(3): stretched}
    halves = Halves.of(candidates.passages)
    found = calibrate(runs, candidates, halves)
    assert [item.setting for item in found] == list(runs)
    for item in found:
        calibrated, sigmoid = (item.errors[name].expected_calibration_error for name in ("calibrated", "sigmoid"))
        assert calibrated < 0.05 < sigmoid
    # One threshold means the same at both.
    scores = torch.linspace(-6, 6, 50)
    deep, shallow = (item.calibration for item in found)
    torch.testing.assert_close(deep(scores), shallow(5 * scores), atol=0.05, rtol=0)


def test_the_half_that_reports_is_not_fitted_to():
    data = drawn(expit)
    candidates, run = collection_of(data)
    halves = Halves.of(candidates.passages)
    queries = list(candidates.passages)
    held_out = {queries[place] for place in halves.held_out}
    changed = {query: {n: -s if query in held_out else s for n, s in scores.items()} for query, scores in run.items()}
    (one,), (other,) = (calibrate({Setting(6): each}, candidates, halves) for each in (run, changed))
    assert one.calibration == other.calibration
    assert one.errors["calibrated"].brier_score < other.errors["calibrated"].brier_score
    assert len(judgements_of(run, candidates, halves.choosing).scores) == 20 * len(halves.choosing)


def test_candidates_of_one_kind_are_refused():
    data = drawn(expit)
    none = Judgements(data.scores, np.zeros_like(data.relevant), data.queries)
    candidates, _ = collection_of(none)
    with pytest.raises(ValueError, match=r"mine: of .* candidates of the .* choosing queries none are relevant"):
        check_calibration(candidates, Halves.of(candidates.passages))
    candidates, _ = collection_of(data)
    check_calibration(candidates, Halves.of(candidates.passages))
