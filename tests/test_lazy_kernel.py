"""The lazy kernel's moves, against transition matrices enumerated here from their definition."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mcpo.config import KernelConfig
from mcpo.mc_kernel import LazyBatch, draws_needed, lazy_draw
from mcpo.mc_kernel.lazy import audit, next_weights, propose, with_fresh

Matrix = NDArray[np.float64]

FRESH = np.array([0.3, 1.9, -0.8, 1.1, 0.0])
STALE = np.array([1.5, 0.2, 0.4, -1.0, 0.7])
LAZY = KernelConfig(scoring="lazy")
COUNT = 20_000


def softmax(score: Matrix) -> Matrix:
    weight = np.exp(score - score.max())
    return weight / weight.sum()


def move_matrix(weight: Matrix, stale: Matrix) -> Matrix:
    """Independence Metropolis-Hastings with target ``weight`` and proposals from ``stale``."""
    size = len(weight)
    matrix = np.zeros((size, size))
    for state, proposed in itertools.product(range(size), repeat=2):
        ratio = (weight[proposed] / stale[proposed]) / (weight[state] / stale[state])
        matrix[state, proposed] += stale[proposed] * min(1.0, ratio)
        matrix[state, state] += stale[proposed] * (1 - min(1.0, ratio))
    return matrix


def batch_of(
    state_P: torch.Tensor, known_PF: torch.Tensor, config: KernelConfig, seed: int = 0
) -> LazyBatch:
    """A chain on each of many prompts, all candidates packed; place 0 is the chosen one."""
    count, width = known_PF.shape
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, draws_needed(config), width, generator=generator).double()
    in_pool = torch.arange(width).expand(count, -1) > 0
    proposal, log_u = propose(known_PF, in_pool, config, -(-uniform.log()).log())
    return LazyBatch(
        known_PF=known_PF,
        in_pool_PF=in_pool,
        age_PF=torch.zeros(count, width, dtype=torch.int64),
        column_PC=torch.arange(width).expand(count, -1),
        state_PM=state_P[:, None],
        proposal_PMK=proposal,
        log_u_PMK=log_u,
    )


def with_chosen(score: Matrix, count: int = 1) -> torch.Tensor:
    return torch.tensor([0.0, *score]).double().expand(count, -1)


def chi_squared(observed: Matrix, expected: Matrix) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


# One move.


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_the_full_kernels_weights_are_stationary_whatever_the_stale_ones_are(
    seed: int, temperature: float
) -> None:
    """The transition matrix out of the code itself, a row from each state."""
    draw = np.random.default_rng(seed)
    fresh, stale = draw.normal(size=(2, 5))
    config = dataclasses.replace(LAZY, temperature=temperature)
    lazy = batch_of(torch.arange(1, 6), with_chosen(stale, 5), config)
    matrix = next_weights(lazy, with_chosen(fresh, 5), config)[:, 0, 1:].numpy()
    weight = softmax(fresh / temperature)
    np.testing.assert_allclose(matrix, move_matrix(weight, softmax(stale / temperature)))
    np.testing.assert_allclose(weight @ matrix, weight, rtol=1e-13)
    flow = weight[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, rtol=1e-12)
    # It is no accident of these numbers that a state is left.
    assert np.abs(matrix - np.eye(5)).max() > 0.1


@pytest.mark.parametrize("steps", [1, 3])
def test_moves_follow_the_matrix(steps: int) -> None:
    config = dataclasses.replace(LAZY, chain_steps=steps)
    lazy = batch_of(torch.full((COUNT,), 2), with_chosen(STALE, COUNT), config)
    mask = torch.ones(COUNT, 6, dtype=torch.bool)
    draw = lazy_draw(with_chosen(FRESH, COUNT), mask, lazy, config)
    matrix = move_matrix(softmax(FRESH), softmax(STALE))
    expected = np.linalg.matrix_power(matrix, steps)[1] * COUNT
    observed = np.bincount(draw.negative_PM[:, 0].numpy(), minlength=6)[1:]
    # The 1 - 1e-6 quantile with 4 degrees of freedom.
    assert chi_squared(observed, expected) < 33.4
    # And what an audit computes is this distribution.
    one = batch_of(torch.tensor([2]), with_chosen(STALE), config)
    got = next_weights(one, with_chosen(FRESH), config)[0, 0, 1:].numpy()
    np.testing.assert_allclose(got * COUNT, expected)


def test_with_exact_weights_every_proposal_is_accepted_and_the_draw_is_one_from_them() -> None:
    lazy = batch_of(torch.full((COUNT,), 3), with_chosen(FRESH, COUNT), LAZY)
    mask = torch.ones(COUNT, 6, dtype=torch.bool)
    draw = lazy_draw(with_chosen(FRESH, COUNT), mask, lazy, LAZY)
    assert (draw.chain["mc/acceptance"] == 1).all()
    assert (draw.chain["mc/drift"] == 0).all()
    assert torch.equal(draw.negative_PM[:, 0], lazy.proposal_PMK[:, 0, 0])
    observed = np.bincount(draw.negative_PM[:, 0].numpy(), minlength=6)[1:]
    assert chi_squared(observed, softmax(FRESH) * COUNT) < 33.4
    found = audit(lazy, with_chosen(FRESH, COUNT), LAZY)
    assert float(found["mc/lazy_tv"].max()) < 1e-15
    assert float(found["mc/stale_tv"].max()) == 0.0


def test_acceptance_uses_the_stale_weight_of_the_state_at_the_time_of_the_proposal() -> None:
    """A state whose own stale weight were taken for its fresh one would be left too seldom."""
    weight, stale = softmax(FRESH), softmax(STALE)
    lazy = batch_of(torch.full((COUNT,), 1), with_chosen(STALE, COUNT), LAZY)
    mask = torch.ones(COUNT, 6, dtype=torch.bool)
    draw = lazy_draw(with_chosen(FRESH, COUNT), mask, lazy, LAZY)
    ratio = (weight / stale) / (weight[0] / stale[0])
    expected = float((stale * np.minimum(1.0, ratio)).sum())
    got = float(draw.chain["mc/acceptance"].mean())
    assert abs(got - expected) < 5 * 0.5 / COUNT**0.5
    wrong = float((stale * np.minimum(1.0, weight / stale)).sum())
    assert abs(wrong - expected) > 0.1


def test_an_audit_measures_total_variation() -> None:
    lazy = batch_of(torch.tensor([4]), with_chosen(STALE), LAZY)
    found = audit(lazy, with_chosen(FRESH), LAZY)
    weight, stale = softmax(FRESH), softmax(STALE)
    following = move_matrix(weight, stale)[3]
    assert found["mc/lazy_tv"].item() == pytest.approx(np.abs(following - weight).sum() / 2)
    assert found["mc/stale_tv"].item() == pytest.approx(np.abs(stale - weight).sum() / 2)


# Moves that teach the stale weights.


def visits_matrix(weight: Matrix, stale_score: Matrix, fresh_score: Matrix) -> Matrix:
    """Joint over (state, which candidates have been scored): scored ones are no longer stale."""
    size = len(weight)
    matrix = np.zeros((size * 2**size,) * 2)
    for state, known in itertools.product(range(size), range(2**size)):
        is_known = np.array([known >> place & 1 for place in range(size)], dtype=bool)
        stale = softmax(np.where(is_known, fresh_score, stale_score))
        for proposed in range(size):
            following = known | 1 << state | 1 << proposed
            ratio = (weight[proposed] / stale[proposed]) / (weight[state] / stale[state])
            accepted = stale[proposed] * min(1.0, ratio)
            here = state * 2**size + known
            matrix[here, proposed * 2**size + following] += accepted
            matrix[here, state * 2**size + following] += stale[proposed] - accepted
    return matrix


def test_chains_that_learn_end_in_the_full_kernels_distribution() -> None:
    """With frozen weights: the stale ones become exact in the end, and then draws are the full
    kernel's; on the way they are off, and by how much is enumerated and simulated."""
    size = 4
    fresh, stale = FRESH[:size], STALE[:size]
    weight = softmax(fresh)
    matrix = visits_matrix(weight, stale, fresh)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    joint = np.zeros(len(matrix))
    joint[:: 2**size] = softmax(stale)
    marginals = [joint.reshape(size, -1).sum(axis=1)]
    for _ in range(600):
        joint = joint @ matrix
        marginals.append(joint.reshape(size, -1).sum(axis=1))
    distance = [float(np.abs(each - weight).sum() / 2) for each in marginals]
    assert distance[0] > 0.3
    # Until a visit that scores the last stale candidate, of which the least likely takes longest.
    assert distance[-1] < 1e-9
    known = joint.reshape(size, -1).sum(axis=0)
    assert known[-1] > 1 - 1e-9

    state = torch.from_numpy(np.random.default_rng(0).choice(size, COUNT, p=softmax(stale))) + 1
    known_PF = with_chosen(stale, COUNT)
    mask = torch.ones(COUNT, size + 1, dtype=torch.bool)
    for visit in range(1, 5):
        lazy = batch_of(state, known_PF, LAZY, seed=visit)
        # Packed: the chosen one, the state and the proposal.
        columns = torch.stack([torch.zeros_like(state), state, lazy.proposal_PMK[:, 0, 0]], dim=1)
        lazy = dataclasses.replace(lazy, column_PC=columns)
        score = with_chosen(fresh, COUNT).gather(1, columns)
        twice = torch.stack(
            [torch.ones_like(state), torch.ones_like(state), columns[:, 1] != columns[:, 2]], dim=1
        ).bool()
        draw = lazy_draw(score, twice, lazy, LAZY)
        known_PF = with_fresh(lazy, score, mask[:, :3])
        state = columns.gather(1, draw.negative_PM)[:, 0]
        observed = np.bincount(state.numpy(), minlength=size + 1)[1:]
        # The 1 - 1e-6 quantile with 3 degrees of freedom.
        assert chi_squared(observed, marginals[visit] * COUNT) < 30.7, visit


def test_total_variation_on_the_way_is_as_documented() -> None:
    """The table of docs/math.md: a q that learns, and one that never does."""
    weight, size = softmax(FRESH), len(FRESH)
    learns = visits_matrix(weight, STALE, FRESH)
    fixed = move_matrix(weight, softmax(STALE))
    joint, alone = np.zeros(len(learns)), softmax(STALE)
    joint[:: 2**size] = alone
    got: dict[int, tuple[float, float]] = {}
    for visit in range(33):
        marginal = joint.reshape(size, -1).sum(axis=1)
        got[visit] = tuple(float(np.abs(p - weight).sum() / 2) for p in (marginal, alone))
        joint, alone = joint @ learns, alone @ fixed
    shown = {visit: got[visit] for visit in (0, 1, 2, 4, 8, 16, 32)}
    documented = ((0.61, 0.61), (0.48, 0.48), (0.36, 0.38), (0.20, 0.23), (0.12, 0.09))
    documented += ((0.10, 0.01), (0.06, 0.001))
    for (visit, pair), expected in zip(shown.items(), documented, strict=True):
        assert pair == pytest.approx(expected, abs=0.005), visit


# What is kept and told.


def test_fresh_scores_replace_those_of_packed_candidates_alone() -> None:
    known = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 4.0, 5.0, 6.0]]).double()
    lazy = LazyBatch(
        known_PF=known,
        in_pool_PF=torch.arange(4).expand(2, -1) > 0,
        age_PF=torch.tensor([[9, 2, 4, 6], [9, 1, 1, 1]]),
        column_PC=torch.tensor([[0, 1, 3], [0, 2, 0]]),
        state_PM=torch.tensor([[3], [2]]),
        proposal_PMK=torch.tensor([[[1]], [[2]]]),
        log_u_PMK=torch.tensor([[[-0.1]], [[-0.1]]]).double(),
    )
    score = torch.tensor([[50.0, 1.5, 2.0], [60.0, 5.25, 70.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert with_fresh(lazy, score, mask).tolist() == [[0, 1.5, 2, 2], [0, 4, 5.25, 6]]
    draw = lazy_draw(score, mask, lazy, LAZY)
    # Row 0 gains e^1.5 by the proposal; row 1 is offered its own state.
    assert draw.negative_PM.tolist() == [[1], [1]]
    assert draw.chain["mc/acceptance"].tolist() == [1.0, 1.0]
    assert draw.chain["mc/staleness"].tolist() == [4.0, 1.0]
    assert draw.chain["mc/drift"].tolist() == [0.75, 0.25]
    # Ranks and spread are those of the whole pool: 2, 2 and 1.5 in row 0, 6, 5.25 and 4 in row 1.
    assert draw.rank_PM.tolist() == [[3.0], [2.0]]
    weights = softmax(np.array([2.0, 2.0, 1.5]))
    assert draw.ess_P[0].item() == pytest.approx(1 / (weights**2).sum())
    assert draw.entropy_P[0].item() == pytest.approx(-(weights * np.log(weights)).sum())
    assert math.exp(draw.entropy_P[0].item()) > draw.ess_P[0].item()
    assert not any(value.requires_grad for value in draw.chain.values())
