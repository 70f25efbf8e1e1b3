"""Win rates, differences and length control, against closed forms and recovered coefficients."""

import math

import numpy as np
import pytest

from mcpo.evaluate.length_control import GamedJudgments, LengthModel, fit_length_model
from mcpo.evaluate.win_rate import over_seeds, paired_difference, win_rate

NO_GAMED = GamedJudgments(
    std_delta_length_G=np.zeros(0), difficulty_G=np.zeros(0), preference_G=np.zeros(0)
)


def test_win_rate_of_whole_verdicts():
    rate = win_rate([1, 1, 1, 0, 0.5, 0.5])
    assert (rate.wins, rate.losses, rate.draws, rate.abstained) == (3, 1, 2, 0)
    # (wins + draws / 2) / all, and for whole verdicts the mean is the same.
    assert rate.win_rate == pytest.approx(100 * 4 / 6)
    assert rate.discrete == pytest.approx(100 * 4 / 6)
    deviations = [1 / 3] * 3 + [-2 / 3] + [-1 / 6] * 2
    variance = sum(d * d for d in deviations) / 5
    assert rate.stderr == pytest.approx(100 * math.sqrt(variance / 6))


def test_an_open_comparison_is_no_draw():
    assert win_rate([1, 0, math.nan]).win_rate == 50
    assert win_rate([1, 1, math.nan]).win_rate == 100
    assert win_rate([1, 1, math.nan]).abstained == 1


def test_preferences_outside_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"probability in \[0, 1\].*got 1.7 for question 1.*1 \+"):
        win_rate([0.5, 1.7])
    with pytest.raises(ValueError, match=r"one per question, got the shape \(1, 2\)"):
        win_rate([[0.5, 0.7]])
    with pytest.raises(ValueError, match="needs at least 2 verdicts, got 1 of 3"):
        win_rate([0.5, math.nan, math.nan])


def test_a_paired_error_ignores_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    hard = rng.random(400) * 0.9
    gap = paired_difference(hard + 0.1, hard)
    assert gap.mean == pytest.approx(10)
    assert gap.stderr == pytest.approx(0, abs=1e-12)
    assert win_rate(hard).stderr > 1


def test_a_paired_difference_leaves_out_what_is_open_for_either():
    gap = paired_difference([1, 1, math.nan, 0], [0, 1, 1, math.nan])
    assert gap.mean == 50
    with pytest.raises(ValueError, match="same questions in the same order, got 1 and 2"):
        paired_difference([1], [1, 0])
    with pytest.raises(ValueError, match="at least 2 questions with both verdicts, got 1"):
        paired_difference([1, math.nan], [1, 0])


def test_over_seeds_is_mean_and_sample_deviation():
    assert str(over_seeds([33.0, 35.0, 37.0])) == "35.00 (2.00)"
    assert math.isnan(over_seeds([1.0]).std)
    with pytest.raises(ValueError, match="at least 1 value, got none"):
        over_seeds([])


def simulated(length, difficulty, bias, *, num=4000):
    """Exact probabilities of a known model, whose coefficients a fit must return."""
    rng = np.random.default_rng(1)
    model_length = rng.integers(50, 3000, num)
    base_length = rng.integers(50, 3000, num)
    gamma = rng.normal(size=num)
    delta = base_length - model_length
    logit = length * np.tanh(delta / delta.std(ddof=1)) + difficulty * gamma + bias
    return 1 / (1 + np.exp(-logit)), model_length, base_length, gamma


@pytest.mark.parametrize("truth", [(-1.2, 0.7, 0.4), (0.0, -0.5, -2.0), (3.0, 0.0, 0.0)])
def test_the_fit_recovers_a_known_model(truth):
    preference, ours, base, gamma = simulated(*truth)
    model = fit_length_model(preference, ours, base, gamma, NO_GAMED)
    assert (model.length, model.difficulty, model.bias) == pytest.approx(truth, abs=1e-6)


def test_length_control_undoes_what_length_bought():
    # Longer answers win and nothing else matters: at equal lengths the models are even.
    preference, ours, base, gamma = simulated(-2.0, 0.0, 0.0)
    longer = ours > base
    model = fit_length_model(
        preference[longer], ours[longer], base[longer], gamma[longer], NO_GAMED
    )
    assert 100 * preference[longer].mean() > 70
    # The spread of lengths differs in this half, so the fit is not exact.
    assert model.win_rate(gamma[longer]) == pytest.approx(50, abs=5)


def test_gamed_judgments_pull_the_length_coefficient_alone():
    preference, ours, base, gamma = simulated(0.0, 0.5, 0.3, num=50)
    gamed = GamedJudgments(
        std_delta_length_G=np.array([-2.0, 2.0] * 500),
        difficulty_G=np.zeros(1000),
        preference_G=np.array([0.9, 0.1] * 500),
    )
    free = fit_length_model(preference, ours, base, gamma, NO_GAMED)
    held = fit_length_model(preference, ours, base, gamma, gamed)
    assert free.length == pytest.approx(0, abs=1e-6)
    assert held.length < -1


def test_a_strong_penalty_empties_the_model_and_a_weak_one_changes_nothing():
    preference, ours, base, gamma = simulated(-1.0, 0.5, 0.3)
    free = fit_length_model(preference, ours, base, gamma, NO_GAMED)
    weak = fit_length_model(preference, ours, base, gamma, NO_GAMED, l1_C=1e6)
    strong = fit_length_model(preference, ours, base, gamma, NO_GAMED, l1_C=1e-6)
    assert weak.bias == pytest.approx(free.bias, abs=1e-4)
    assert strong == LengthModel(length=0, difficulty=0, bias=0)
    assert strong.win_rate(gamma) == 50


def test_open_comparisons_join_no_fit():
    preference, ours, base, gamma = simulated(-1.0, 0.5, 0.3)
    preference[::7] = math.nan
    model = fit_length_model(preference, ours, base, gamma, NO_GAMED)
    assert model.bias == pytest.approx(0.3, abs=1e-6)


def test_what_cannot_be_controlled_is_refused():
    with pytest.raises(ValueError, match=r"lengths differ.*the same difference, 5\.0, for all"):
        fit_length_model([1, 0], [10, 20], [15, 25], [0, 0], NO_GAMED)
    with pytest.raises(ValueError, match="one entry per question"):
        fit_length_model([1, 0], [10, 20], [15], [0, 0], NO_GAMED)
