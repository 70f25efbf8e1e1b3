from __future__ import annotations

import math

import pytest
import torch

from mcpo.config import LossConfig
from mcpo.losses import LOSSES, dpo, loss_named, mcpo
from mcpo.records import ScoredBatch

CONFIG = LossConfig(beta=0.3)


def scored(
    logp: torch.Tensor, negatives: list[list[int]], drawn: list[list[bool]] | None = None
) -> ScoredBatch:
    generator = torch.Generator().manual_seed(5)
    ref = torch.randn(logp.shape, generator=generator, dtype=logp.dtype) * 3
    negative = torch.tensor(negatives)
    return ScoredBatch(
        logp_PC=logp,
        ref_logp_PC=ref,
        length_PC=torch.ones(logp.shape, dtype=torch.int64),
        mask_PC=torch.ones(logp.shape, dtype=torch.bool),
        negative_PM=negative,
        negative_mask_PM=torch.ones_like(negative, dtype=torch.bool)
        if drawn is None
        else torch.tensor(drawn),
    )


def random_logps(prompts: int, candidates: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logp = torch.randn(prompts, candidates, generator=generator, dtype=torch.float64) * 3 - 10
    return logp.requires_grad_()


def test_one_negative_makes_mcpo_dpo() -> None:
    logp = random_logps(4, 3)
    batch = scored(logp, [[1], [2], [1], [2]])
    torch.testing.assert_close(mcpo(batch, CONFIG), dpo(batch, CONFIG), rtol=0, atol=1e-14)
    (from_mcpo,) = torch.autograd.grad(mcpo(batch, CONFIG).sum(), logp)
    (from_dpo,) = torch.autograd.grad(dpo(batch, CONFIG).sum(), logp)
    torch.testing.assert_close(from_mcpo, from_dpo, rtol=0, atol=1e-15)


def test_dpo_equals_its_formula() -> None:
    logp = random_logps(1, 2)
    batch = scored(logp, [[1]])
    delta = (logp[0] - batch.ref_logp_PC[0]).tolist()
    expected = math.log1p(math.exp(-0.3 * (delta[0] - delta[1])))
    assert dpo(batch, CONFIG).item() == pytest.approx(expected, rel=1e-12)


def test_mcpo_gradient_is_the_softmax_of_rewards() -> None:
    """d loss / d r_i = p_i - 1[i = 0] with p = softmax over the chosen and the drawn."""
    logp = random_logps(1, 4)
    batch = scored(logp, [[3, 1]])
    (gradient,) = torch.autograd.grad(mcpo(batch, CONFIG).sum(), logp)
    reward = 0.3 * (logp - batch.ref_logp_PC).detach()[0]
    probability = torch.softmax(reward[[0, 3, 1]], 0)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[[0, 3, 1]] = 0.3 * (probability - torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(gradient[0], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_draws_change_nothing(name: str) -> None:
    logp = random_logps(1, 4)
    loss = loss_named(name)
    alone = loss(scored(logp, [[2]]), CONFIG)
    padded = loss(scored(logp, [[2, 1, 3]], [[True, False, False]]), CONFIG)
    torch.testing.assert_close(alone, padded, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(padded.sum(), logp)
    assert gradient[0, [1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_untrained_policy_gives_log_of_one_plus_m(name: str) -> None:
    logp = torch.zeros(2, 4, dtype=torch.float64)
    batch = scored(logp, [[1], [2]])
    batch = ScoredBatch(
        **{field: getattr(batch, field) for field in batch.__slots__} | {"ref_logp_PC": logp}
    )
    torch.testing.assert_close(
        loss_named(name)(batch, CONFIG), torch.full((2,), math.log(2), dtype=torch.float64)
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_log_ratios_stay_finite(name: str, scale: float) -> None:
    logp = torch.tensor([[scale, -scale]], dtype=torch.float64, requires_grad=True)
    loss = loss_named(name)(scored(logp, [[1]]), CONFIG)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    logp = random_logps(3, 4)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return loss_named(name)(scored(value, [[1, 2], [3, 1], [2, 3]]), CONFIG)

    assert torch.autograd.gradcheck(loss, (logp,))


def test_unknown_loss_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="loss_type must be one of mcpo, dpo, got 'dpoo'"):
        loss_named("dpoo")
