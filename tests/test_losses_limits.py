"""How losses become one another, and what is true of them in the mean over draws and labels."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scored_batches import config_of, random_logps, scored

from mcpo.losses import LOSSES, over_pool
from mcpo.losses.pairwise import margins
from mcpo.records import Baselines, ScoredBatch


def both(name: str, batch: ScoredBatch, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The value and the gradient of a loss."""
    loss_P = LOSSES[name](batch, config_of(name, **options))
    (gradient,) = torch.autograd.grad(loss_P.sum(), batch.logp_PC)
    return loss_P, gradient


def assert_same(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> None:
    # A few roundings of numbers below a hundred.
    for mine, yours in zip(one, other, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-13, atol=1e-13)


ONE = scored(random_logps(4, 3), [[1], [2], [1], [2]])


@pytest.mark.parametrize("name", ["mcpo", "rnce"])
def test_one_negative_makes_the_listwise_loss_dpo(name: str) -> None:
    assert_same(both(name, ONE), both("dpo", ONE))


@pytest.mark.parametrize(
    ("name", "options"), [("cdpo", {"label_smoothing": 0.0}), ("robust", {"label_smoothing": 0.0})]
)
def test_without_smoothing_these_are_dpo(name: str, options: dict[str, float]) -> None:
    assert_same(both(name, ONE, **options), both("dpo", ONE))


def test_without_weight_the_nll_is_gone() -> None:
    assert_same(both("rpo", ONE, rpo_alpha=0.0), both("dpo", ONE))
    reference_free = replace(ONE, ref_logp_PC=torch.zeros_like(ONE.ref_logp_PC))
    assert_same(both("cpo", ONE, cpo_alpha=0.0, label_smoothing=0.0), both("dpo", reference_free))


def test_bco_and_kto_without_baselines() -> None:
    bare = replace(ONE, baselines=Baselines())
    assert_same(both("kto", bare), both("apo_zero", bare))
    delta = 0.7
    shifted = replace(
        ONE,
        # A baseline is a shift of the reference's log-probabilities by delta / beta.
        ref_logp_PC=ONE.ref_logp_PC + delta / 0.3,
        baselines=Baselines(),
    )
    judged = replace(ONE, baselines=Baselines(delta=delta, z0=delta))
    for name in ("bco", "kto"):
        assert_same(both(name, judged), both(name, shifted))


def test_ipo_of_single_tokens_is_ipo_of_sums() -> None:
    short = replace(ONE, length_PC=torch.ones_like(ONE.length_PC))
    assert_same(both("ipo", short), both("ipo_sum", short))


def test_a_sure_best_of_two_makes_nca_of_ratings_that_of_a_pair() -> None:
    rating = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2)
    two = scored(random_logps(4, 2), [[1]] * 4, rating_PC=rating)
    # e^-1000 is 0.
    assert_same(both("nca_rated", two, rating_temperature=1e-3), both("nca", two))


def test_a_sure_best_makes_infonca_the_listwise_loss_of_the_pool() -> None:
    rating = torch.tensor([[1.0, 0.0, -1.0, 0.5]], dtype=torch.float64)
    batch = scored(random_logps(1, 4), [[2]], rating_PC=rating)
    assert_same(both("infonca", batch, rating_temperature=1e-4), both("mcpo", over_pool(batch)))


def test_infonca_is_least_where_the_policy_has_the_targets() -> None:
    batch = scored(random_logps(1, 4), [[1]])
    assert batch.rating_PC is not None
    ideal = (batch.ref_logp_PC + batch.rating_PC / 0.3).requires_grad_()
    _, gradient = both("infonca", replace(batch, logp_PC=ideal))
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("name", ["cdpo", "exo"])
def test_smoothed_labels_are_met_where_the_margin_is_their_log_odds(name: str) -> None:
    ref = torch.tensor([[-7.0, -9.0]], dtype=torch.float64)
    margin = math.log(0.9 / 0.1) / 0.3
    logp = (ref + torch.tensor([[margin, 0.0]], dtype=torch.float64)).requires_grad_()
    loss_P, gradient = both(name, scored(logp, [[1]], ref_logp_PC=ref))
    assert gradient.abs().max() < 1e-15
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert loss_P.item() == pytest.approx({"cdpo": entropy, "exo": 0.0}[name], abs=1e-15)


def test_robust_is_dpo_in_the_mean_over_wrong_labels() -> None:
    """A wrong label swaps the two completions of a pair."""
    logp = random_logps(4, 2)
    right = scored(logp, [[1]] * 4)
    swapped = replace(right, logp_PC=logp.flip(1), ref_logp_PC=right.ref_logp_PC.flip(1))
    config = config_of("robust", label_smoothing=0.2)
    torch.testing.assert_close(margins(swapped, config), -margins(right, config))
    mean_P = 0.8 * LOSSES["robust"](right, config) + 0.2 * LOSSES["robust"](swapped, config)
    torch.testing.assert_close(mean_P, LOSSES["dpo"](right, config), rtol=1e-14, atol=1e-14)


def test_augmented_dpo_is_the_mean_of_dpo_over_the_pool() -> None:
    logp = random_logps(1, 5)
    every = [both("dpo", scored(logp, [[column]])) for column in range(1, 5)]
    mean = torch.stack([loss for loss, _ in every]).mean(0)
    gradient = torch.stack([gradient for _, gradient in every]).mean(0)
    assert_same(both("dpo", over_pool(scored(logp, [[3]]))), (mean, gradient))


def probabilities(batch: ScoredBatch) -> torch.Tensor:
    """[C - 1] of a draw by the MC kernel with the paper's score."""
    reward = 0.3 * (batch.logp_PC - batch.ref_logp_PC).detach()
    return torch.softmax(reward[0, 1:], 0)


@pytest.mark.parametrize("num_draws", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_mcpo_unbiased_has_in_the_mean_the_gradient_of_all_negatives(
    seed: int, num_draws: int
) -> None:
    """By enumeration of every outcome of the draws, which are with replacement."""
    logp = random_logps(1, 6, seed)
    whole = scored(logp, [list(range(1, 6))])
    weight = probabilities(whole)
    value, expected = both("mcpo", whole)
    mean, total = torch.zeros_like(expected), 0.0
    for outcome in itertools.product(range(1, 6), repeat=num_draws):
        loss_P, gradient = both("mcpo_unbiased", scored(logp, [list(outcome)]))
        torch.testing.assert_close(loss_P, value, rtol=1e-14, atol=1e-14)
        chance = math.prod(float(weight[column - 1]) for column in outcome)
        mean, total = mean + chance * gradient, total + chance
    assert total == pytest.approx(1.0, rel=1e-12)
    assert (mean - expected).abs().max() < 1e-12


def test_one_draw_of_mcpo_is_not_unbiased() -> None:
    """Hardness enters twice: what ``mcpo_unbiased`` is for."""
    logp = random_logps(1, 6)
    whole = scored(logp, [list(range(1, 6))])
    weight = probabilities(whole)
    _, expected = both("mcpo", whole)
    mean = sum(
        float(weight[column - 1]) * both("mcpo", scored(logp, [[column]]))[1]
        for column in range(1, 6)
    )
    assert (mean - expected).abs().max() > 0.01
