from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from mcpo.config import KernelConfig
from mcpo.mc_kernel import candidate_scores, gumbel_noise, sample_negatives

SCORES = torch.tensor([[9.0, 0.0, 1.5, -0.7, 0.4]])
FULL = torch.ones(1, 5, dtype=torch.bool)


def draws(config: KernelConfig, mask: torch.Tensor = FULL, count: int = 20_000) -> torch.Tensor:
    """[count, M] negatives drawn for ``count`` rows that share scores and mask."""
    width = config.num_negatives if config.replacement else 1
    noise = gumbel_noise(0, 0, [str(i) for i in range(count)], num_draws=width, num_candidates=5)
    draw = sample_negatives(SCORES.expand(count, -1), mask.expand(count, -1), config, noise)
    assert draw.mask_PM.all()
    return draw.negative_PM


def chi_squared(observed: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((observed - expected).square() / expected).sum())


# The 1 - 1e-6 quantiles of the chi-squared distribution by degrees of freedom.
CRITICAL = {3: 30.66, 11: 48.0, 15: 56.5}


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_draw_frequencies_follow_the_softmax_of_the_pool(temperature: float) -> None:
    config = KernelConfig(temperature=temperature)
    drawn = draws(config)[:, 0]
    expected = torch.softmax(SCORES[0, 1:] / temperature, 0) * len(drawn)
    observed = torch.bincount(drawn, minlength=5)[1:].double()
    assert chi_squared(observed, expected) < CRITICAL[3]


def test_random_ignores_the_scores() -> None:
    drawn = draws(KernelConfig(strategy="random"))[:, 0]
    observed = torch.bincount(drawn, minlength=5)[1:].double()
    assert chi_squared(observed, torch.full((4,), len(drawn) / 4.0)) < CRITICAL[3]


def test_two_draws_without_replacement_follow_successive_sampling() -> None:
    drawn = draws(KernelConfig(num_negatives=2))
    weight = torch.softmax(SCORES[0, 1:].double(), 0)
    pairs = list(itertools.permutations(range(4), 2))
    expected = torch.tensor([weight[a] * weight[b] / (1 - weight[a]) for a, b in pairs])
    code = (drawn[:, 0] - 1) * 4 + (drawn[:, 1] - 1)
    observed = torch.tensor([(code == a * 4 + b).sum() for a, b in pairs]).double()
    assert observed.sum() == len(drawn)
    assert chi_squared(observed, expected * len(drawn)) < CRITICAL[11]


def test_two_draws_with_replacement_are_independent() -> None:
    drawn = draws(KernelConfig(num_negatives=2, replacement=True))
    weight = torch.softmax(SCORES[0, 1:].double(), 0)
    code = (drawn[:, 0] - 1) * 4 + (drawn[:, 1] - 1)
    observed = torch.bincount(code, minlength=16).double()
    expected = (weight[:, None] * weight[None]).reshape(-1) * len(drawn)
    assert chi_squared(observed, expected) < CRITICAL[15]


@pytest.mark.parametrize(
    ("strategy", "expected"), [("max", [2, 4, 1]), ("min", [3, 1, 4])], ids=["max", "min"]
)
def test_max_and_min_take_the_ends_of_the_order(strategy: str, expected: list[int]) -> None:
    config = KernelConfig(strategy=strategy, num_negatives=3)  # pyright: ignore[reportArgumentType]
    assert draws(config, count=1).tolist() == [expected]


def test_temperature_limits_are_max_and_uniform() -> None:
    cold = draws(KernelConfig(temperature=1e-3), count=500)
    assert (cold == 2).all()
    hot = draws(KernelConfig(temperature=1e6))[:, 0]
    observed = torch.bincount(hot, minlength=5)[1:].double()
    assert chi_squared(observed, torch.full((4,), len(hot) / 4.0)) < CRITICAL[3]


def test_chosen_and_absent_candidates_are_never_drawn() -> None:
    mask = torch.tensor([[True, True, False, True, False]])
    assert set(draws(KernelConfig(), mask)[:, 0].tolist()) == {1, 3}
    assert set(draws(KernelConfig(strategy="min"), mask, count=3)[:, 0].tolist()) == {3}


def test_a_small_pool_is_used_up_and_the_rest_masked() -> None:
    mask = torch.tensor([[True, True, False, False, True], [True, False, False, True, False]])
    noise = gumbel_noise(0, 0, ["a", "b"], num_draws=1, num_candidates=5)
    config = KernelConfig(num_negatives=3)
    draw = sample_negatives(SCORES.expand(2, -1), mask, config, noise)
    assert draw.mask_PM.tolist() == [[True, True, False], [True, False, False]]
    assert set(draw.negative_PM[0, :2].tolist()) == {1, 4}
    assert draw.negative_PM[1, 0] == 3


def test_noise_depends_on_seed_step_and_row_alone() -> None:
    noise = gumbel_noise(1, 7, ["a", "b", "c"], num_draws=1, num_candidates=4)
    alone = gumbel_noise(1, 7, ["b"], num_draws=1, num_candidates=4)
    wider = gumbel_noise(1, 7, ["c", "b"], num_draws=1, num_candidates=9)
    assert torch.equal(noise[1], alone[0])
    assert torch.equal(wider[1, :, :4], alone[0])
    for other in (
        gumbel_noise(2, 7, ["b"], num_draws=1, num_candidates=4),
        gumbel_noise(1, 8, ["b"], num_draws=1, num_candidates=4),
    ):
        assert not torch.equal(other, alone)


@pytest.mark.parametrize(("bits", "edge"), [(0, 2.0**-53), (2**64 - 1, 1 - 2.0**-53)])
def test_noise_is_finite_at_both_ends(
    monkeypatch: pytest.MonkeyPatch, bits: int, edge: float
) -> None:
    """An infinite key would draw a candidate from outside the pool."""

    class Stream:
        def __init__(self, key: int) -> None:
            assert key

        def random_raw(self, count: int) -> object:
            return np.full(count, bits, dtype=np.uint64)

    monkeypatch.setattr(np.random, "Philox", Stream)
    noise = gumbel_noise(0, 0, ["a"], num_draws=1, num_candidates=2)
    assert noise.tolist() == [[[-math.log(-math.log(edge))] * 2]]


def test_spread_of_the_weights_and_rank_of_the_draw() -> None:
    noise = torch.zeros(1, 1, 5, dtype=torch.float64)
    uniform = sample_negatives(torch.zeros(1, 5), FULL, KernelConfig(), noise)
    assert uniform.ess_P.item() == 4.0
    assert uniform.entropy_P.item() == pytest.approx(math.log(4), rel=1e-15)
    # The second best lies e^-110 below the best: in float64 nothing of it is left.
    sure = sample_negatives(SCORES * 100, FULL, KernelConfig(strategy="min"), noise)
    assert sure.ess_P.item() == 1.0
    assert sure.entropy_P.item() == pytest.approx(0.0, abs=1e-45)
    even = torch.tensor([[9.0, 2.0, 2.0, -1e9, -1e9]])
    half = sample_negatives(even, FULL, KernelConfig(temperature=0.5), noise)
    assert half.ess_P.item() == 2.0
    assert half.entropy_P.item() == pytest.approx(math.log(2), rel=1e-15)
    assert sure.rank_PM.tolist() == [[4.0]]


def test_the_four_scores() -> None:
    logp, ref, length = torch.tensor([[-6.0]]), torch.tensor([[-4.0]]), torch.tensor([[3]])
    got = {
        score: candidate_scores(logp, ref, length, score=score, beta=0.1).item()
        for score in ("log_ratio", "logp_scaled", "logp", "mean_logp")
    }
    expected = {"log_ratio": -0.2, "logp_scaled": -0.6, "logp": -6.0, "mean_logp": -2.0}
    # beta is rounded once and the product once, each by half a unit.
    assert got == pytest.approx(expected, rel=torch.finfo(torch.float32).eps, abs=0)
    with pytest.raises(ValueError, match=r"score must be log_ratio.*got 'likelihood'"):
        candidate_scores(logp, ref, length, score="likelihood", beta=0.1)


def test_the_score_of_the_rows_is_taken_as_it_is() -> None:
    logp, ref, length = torch.tensor([[-6.0]]), torch.tensor([[-4.0]]), torch.tensor([[3]])
    given = torch.tensor([[4.5]])
    got = candidate_scores(logp, ref, length, score="external", beta=0.1, external_PC=given)
    assert torch.equal(got, given)
    with pytest.raises(ValueError, match="score: external needs the scores of the rows, got none"):
        candidate_scores(logp, ref, length, score="external", beta=0.1)


@pytest.mark.parametrize("strategy", ["mc", "random", "max", "min"])
def test_draws_carry_no_gradient(strategy: str) -> None:
    scores = SCORES.clone().requires_grad_()
    noise = gumbel_noise(0, 0, ["a"], num_draws=1, num_candidates=5).requires_grad_()
    config = KernelConfig(strategy=strategy)  # pyright: ignore[reportArgumentType]
    draw = sample_negatives(scores, FULL, config, noise)
    outputs = [
        getattr(draw, each.name) for each in dataclasses.fields(draw) if each.name != "chain"
    ]
    assert len(outputs) == 5
    for output in outputs:
        assert isinstance(output, torch.Tensor)
        assert not output.requires_grad
