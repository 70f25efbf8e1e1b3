"""Chains over a pool, against transition matrices enumerated here from their definition."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mcpo.config import KernelConfig
from mcpo.mc_kernel import draws_needed, gumbel_noise, sample_negatives

Matrix = NDArray[np.float64]

# Six candidates, each e^1.75 times as likely as the one before it.
SCORES = 1.75 * np.arange(6)
WEIGHTS = np.exp(SCORES) / np.exp(SCORES).sum()
STEPS = (1, 2, 4, 8)
# The 1 - 1e-6 quantile of the chi-squared distribution with 5 degrees of freedom.
CRITICAL = 35.89
COUNT = 30_000


def subset_matrix(weights: Matrix, proposals: int) -> Matrix:
    """Every set of others is as likely; then a draw by weight from it and the state."""
    size = len(weights)
    matrix = np.zeros((size, size))
    for state in range(size):
        others = [other for other in range(size) if other != state]
        sets = list(itertools.combinations(others, proposals))
        for proposed in sets:
            among = [state, *proposed]
            for following in among:
                matrix[state, following] += weights[following] / weights[among].sum() / len(sets)
    return matrix


def metropolis_matrix(weights: Matrix) -> Matrix:
    size = len(weights)
    matrix = np.zeros((size, size))
    for state, proposed in itertools.product(range(size), repeat=2):
        accepted = min(1.0, weights[proposed] / weights[state]) / size
        matrix[state, proposed] += accepted
        matrix[state, state] += 1 / size - accepted
    return matrix


MATRICES = {
    ("subset", 1): subset_matrix(WEIGHTS, 1),
    ("subset", 3): subset_matrix(WEIGHTS, 3),
    ("metropolis", 1): metropolis_matrix(WEIGHTS),
}
CHAINS = pytest.mark.parametrize(("chain", "proposals"), MATRICES)


def after(matrix: Matrix, steps: int) -> Matrix:
    """From a uniform start."""
    return np.full(6, 1 / 6) @ np.linalg.matrix_power(matrix, steps)


def total_variation(one: Matrix, other: Matrix) -> float:
    return float(np.abs(one - other).sum() / 2)


def config_of(chain: str, steps: int, proposals: int = 1, **more: Any) -> KernelConfig:
    return KernelConfig(
        chain=chain,  # pyright: ignore[reportArgumentType]
        chain_steps=steps,
        proposals_per_step=proposals,
        **more,
    )


def draw_many(config: KernelConfig, count: int = COUNT) -> Any:
    """``count`` prompts that share the pool; column 0 would win every draw."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(count, draws_needed(config), 7, generator=generator, dtype=torch.float64)
    score = torch.tensor([99.0, *SCORES]).expand(count, -1)
    mask = torch.ones(count, 7, dtype=torch.bool)
    return sample_negatives(score, mask, config, -(-uniform.log()).log())


@CHAINS
def test_the_weights_are_stationary_and_every_step_is_reversible(
    chain: str, proposals: int
) -> None:
    matrix = MATRICES[chain, proposals]
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(WEIGHTS @ matrix, WEIGHTS, rtol=1e-12)
    flow = WEIGHTS[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, rtol=1e-12)


@pytest.mark.parametrize("steps", STEPS)
@CHAINS
def test_draws_after_some_steps_follow_the_power_of_the_matrix(
    chain: str, proposals: int, steps: int
) -> None:
    draw = draw_many(config_of(chain, steps, proposals))
    expected = after(MATRICES[chain, proposals], steps) * COUNT
    observed = np.bincount(draw.negative_PM[:, 0].numpy(), minlength=7)[1:]
    assert observed.sum() == COUNT
    assert ((observed - expected) ** 2 / expected).sum() < CRITICAL


@pytest.mark.parametrize(
    ("chain", "proposals", "expected"),
    [
        ("subset", 1, (0.505, 0.390, 0.237, 0.090)),
        ("subset", 3, (0.231, 0.087, 0.013, 0.0003)),
        ("metropolis", 1, (0.527, 0.420, 0.268, 0.109)),
    ],
)
def test_total_variation_decays_as_documented(
    chain: str, proposals: int, expected: tuple[float, ...]
) -> None:
    """The figures of docs/math.md, to the last digit that stands there."""
    matrix = MATRICES[chain, proposals]
    got = [total_variation(after(matrix, steps), WEIGHTS) for steps in STEPS]
    assert got == pytest.approx(expected, abs=0.0005)


def test_without_the_state_among_the_candidates_the_weights_are_not_stationary() -> None:
    """Why the state is kept: the chain that must move goes somewhere else."""
    matrix = np.zeros((6, 6))
    for state in range(6):
        others = [other for other in range(6) if other != state]
        for proposed in itertools.combinations(others, 3):
            among = list(proposed)
            matrix[state, among] += WEIGHTS[among] / WEIGHTS[among].sum() / 10
    assert total_variation(WEIGHTS @ matrix, WEIGHTS) > 0.1


def test_a_step_that_proposes_everybody_else_is_a_draw_from_the_pool() -> None:
    draw = draw_many(config_of("subset", 1, proposals=9))
    expected = WEIGHTS * COUNT
    observed = np.bincount(draw.negative_PM[:, 0].numpy(), minlength=7)[1:]
    assert ((observed - expected) ** 2 / expected).sum() < CRITICAL


@CHAINS
def test_acceptance_is_the_share_of_steps_that_took_a_proposal(chain: str, proposals: int) -> None:
    """Against the mean over a step from the uniform start; a variance is at most one quarter."""
    draw = draw_many(config_of(chain, 1, proposals))
    matrix = MATRICES[chain, proposals]
    moved = 1 - np.trace(matrix) / 6
    # Proposing the state itself is accepted, and moves nowhere.
    expected = moved + 1 / 6 if chain == "metropolis" else moved
    got = draw.chain["mc/acceptance"].mean().item()
    assert abs(got - expected) < 5 * 0.5 / COUNT**0.5


def test_several_chains_are_independent() -> None:
    config = config_of("subset", 2, num_negatives=2, replacement=True)
    drawn = draw_many(config).negative_PM - 1
    one = after(MATRICES["subset", 1], 2)
    expected = (one[:, None] * one).reshape(-1) * COUNT
    observed = np.bincount((drawn[:, 0] * 6 + drawn[:, 1]).numpy(), minlength=36)
    # The 1 - 1e-6 quantile with 35 degrees of freedom.
    assert ((observed - expected) ** 2 / expected).sum() < 89.6


@CHAINS
def test_draws_of_a_row_depend_on_its_own_name_and_pool_alone(chain: str, proposals: int) -> None:
    config = config_of(chain, 3, proposals, num_negatives=2, replacement=True)
    generator = torch.Generator().manual_seed(1)
    score = torch.randn(40, 6, generator=generator)
    mask = torch.arange(6) < torch.randint(2, 7, (40, 1), generator=generator)
    names = [f"row {number}" for number in range(40)]

    def drawn(rows: list[int], width: int) -> list[list[int]]:
        padded = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.bool)
        padded[0][:, :6], padded[1][:, :6] = score[rows], mask[rows]
        noise = gumbel_noise(
            3,
            7,
            [names[row] for row in rows],
            num_draws=draws_needed(config),
            num_candidates=width,
        )
        return sample_negatives(*padded, config, noise).negative_PM.tolist()

    together = drawn(list(range(40)), 6)
    backwards = drawn(list(range(40))[::-1], 9)
    assert backwards == together[::-1]
    assert [drawn([row], 6)[0] for row in range(40)] == together
    sizes = mask.sum(dim=1).tolist()
    assert all(0 < one < size for row, size in zip(together, sizes, strict=True) for one in row)
    # Chains have noise of their own.
    assert any(first != second for first, second in together)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chain_steps": 0}, "chain_steps must be at least 1, got 0"),
        ({"proposals_per_step": 0}, "proposals_per_step must be at least 1, got 0"),
        ({"chain_steps": 2}, "chain_steps above 1 needs chain: subset or metropolis, or scoring"),
        ({"proposals_per_step": 2}, "proposals_per_step above 1 needs chain: subset, got"),
        (
            {"chain": "metropolis", "proposals_per_step": 2},
            "proposals_per_step above 1 needs chain: subset, got 'chain: metropolis'",
        ),
        ({"chain": "subset", "strategy": "max"}, "a chain needs strategy: mc, .* got 'max'"),
        ({"scoring": "lazy", "strategy": "random"}, "a chain needs strategy: mc, .* got 'random'"),
        (
            {"chain": "subset", "num_negatives": 2},
            "several negatives from chains need replacement: true, .* got 2",
        ),
        (
            {"scoring": "lazy", "num_negatives": 3},
            "several negatives from chains need replacement: true, .* got 3",
        ),
        ({"scoring": "lazy", "chain": "subset"}, "lazy is a metropolis chain .* got 'subset'"),
        ({"scoring": "lazy", "score": "external"}, "lazy needs a score that the policy changes"),
        ({"lazy_audit_steps": 5}, "lazy_audit_steps needs scoring: lazy, got 5"),
        ({"lazy_audit_steps": -1}, "lazy_audit_steps must be 0 or more, got -1"),
        ({"sampling": "static"}, r"static draws before the policy .* got \('mc', 'log_ratio'\)"),
        (
            {"sampling": "static", "strategy": "random", "replacement": True},
            "sampling: static needs replacement: false, got True",
        ),
        (
            {"sampling": "static", "score": "external", "chain": "subset"},
            "sampling: static draws once, and needs chain: none and scoring: full",
        ),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:40] if isinstance(value, dict) else "",
)
def test_options_that_mean_nothing_together_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KernelConfig(**options)
