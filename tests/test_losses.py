"""What holds of every loss, and each of them against its formula in plain numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scored_batches import CONFIGS, config_of, random_logps, scored

from mcpo.config import LOSS_TYPES
from mcpo.losses import LOSSES, loss_named, over_pool, terms_of
from mcpo.records import Baselines, ScoredBatch

# What a surrogate is minimised for is another number than its value: it has tests of its own.
DIFFERENTIABLE = [name for name in LOSSES if name != "mcpo_unbiased"]


def value(name: str, batch: ScoredBatch, **options: float) -> torch.Tensor:
    return LOSSES[name](batch, config_of(name, **options))


def test_the_configuration_knows_every_loss() -> None:
    assert tuple(LOSSES) == LOSS_TYPES


# Each loss of a pair, from its definition, in plain floats.


def logsigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(logp: float) -> float:
    return logp - math.log(1 - math.exp(logp))


def smoothed(d: float, e: float = 0.1) -> float:
    return -(1 - e) * logsigma(d) - e * logsigma(-d)


# One pair: logp w and l, log-ratios a and b, lengths n and m, rewards r and s, their difference d.
PLAIN: dict[str, Callable[[SimpleNamespace], float]] = {
    "dpo": lambda p: -logsigma(p.d),
    "rpo": lambda p: -logsigma(p.d) - p.w / 4.5,
    "cdpo": lambda p: smoothed(p.d),
    "robust": lambda p: (-0.9 * logsigma(p.d) + 0.1 * logsigma(-p.d)) / 0.8,
    "exo": lambda p: (
        sigma(p.d) * math.log(sigma(p.d) / 0.9) + sigma(-p.d) * math.log(sigma(-p.d) / 0.1)
    ),
    "hinge": lambda p: max(0.0, 1 - p.d),
    "ipo": lambda p: (p.a / p.n - p.b / p.m - 1 / 0.6) ** 2,
    "ipo_sum": lambda p: (p.a - p.b - 1 / 0.6) ** 2,
    "bco": lambda p: -logsigma(p.r - 0.2) - logsigma(-(p.s - 0.2)),
    "kto": lambda p: 1 - sigma(p.r - 0.3) + 1 - sigma(0.3 - p.s),
    "apo_zero": lambda p: 1 - sigma(p.r) + sigma(p.s),
    "apo_down": lambda p: sigma(p.r) + 1 - sigma(p.d),
    "sppo": lambda p: (p.a - 1 / 0.6) ** 2 + (p.b + 1 / 0.6) ** 2,
    "nca": lambda p: -logsigma(p.r) - 0.5 * logsigma(-p.r) - 0.5 * logsigma(-p.s),
    "simpo": lambda p: smoothed(0.3 * (p.w / p.n - p.l / p.m) - 0.5),
    "cpo": lambda p: smoothed(0.3 * (p.w - p.l)) - p.w / 4.5,
    "orpo": lambda p: -p.w / 4.5 - 0.3 * logsigma(log_odds(p.w / p.n) - log_odds(p.l / p.m)),
}


def pairs_of(batch: ScoredBatch, prompt: int) -> list[SimpleNamespace]:
    logp, ref, length = (
        tensor[prompt].tolist() for tensor in (batch.logp_PC, batch.ref_logp_PC, batch.length_PC)
    )
    rho = [one - other for one, other in zip(logp, ref, strict=True)]
    drawn = zip(batch.negative_PM[prompt], batch.negative_mask_PM[prompt], strict=True)
    return [
        SimpleNamespace(
            w=logp[0],
            l=logp[z],
            a=rho[0],
            b=rho[z],
            n=length[0],
            m=length[z],
            r=0.3 * rho[0],
            s=0.3 * rho[z],
            d=0.3 * (rho[0] - rho[z]),
        )
        for z in (int(column) for column, there in drawn if there)
    ]


@pytest.mark.parametrize("name", PLAIN)
def test_the_mean_over_pairs_equals_the_formula(name: str) -> None:
    """Also where a prompt has fewer negatives than others."""
    batch = scored(
        random_logps(3, 5),
        [[2, 4, 1], [3, 1, 1], [1, 1, 1]],
        [[True] * 3, [True, True, False], [True, False, False]],
    )
    expected = []
    for prompt in range(3):
        pairs = pairs_of(batch, prompt)
        expected.append(sum(map(PLAIN[name], pairs)) / len(pairs))
    # The orders of some ten operations differ, on numbers of at most a thousand.
    assert value(name, batch).tolist() == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_sft_is_the_nll_over_the_mean_length() -> None:
    logp = random_logps(2, 3)
    assert value("sft", scored(logp, [[1], [2]])).tolist() == pytest.approx(
        (-logp[:, 0] / 4.5).tolist(), rel=1e-15
    )


def softmax(values: list[float]) -> list[float]:
    exps = [math.exp(one) for one in values]
    return [one / sum(exps) for one in exps]


def test_listwise_losses_equal_their_formulas() -> None:
    """The second prompt has a candidate less; nothing that stands in its place may count."""
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    batch = scored(random_logps(2, 4), [[3, 1], [2, 1]], mask_PC=mask)
    for prompt, there in ((0, 4), (1, 3)):
        rho = (batch.logp_PC - batch.ref_logp_PC)[prompt, :there].tolist()
        reward = [0.3 * one for one in rho]
        assert batch.rating_PC is not None
        target = softmax([one / 0.7 for one in batch.rating_PC[prompt, :there].tolist()])
        columns = [0, *batch.negative_PM[prompt].tolist()]
        policy = softmax(reward)
        for name in ("mcpo", "rnce"):
            expected = -math.log(softmax([reward[c] for c in columns])[0])
            assert value(name, batch)[prompt].item() == pytest.approx(expected, rel=1e-13)
        assert value("mcpo_unbiased", batch)[prompt].item() == pytest.approx(
            -math.log(policy[0]), rel=1e-13
        )
        expected = -sum(t * math.log(p) for t, p in zip(target, policy, strict=True))
        got = value("infonca", batch, rating_temperature=0.7)[prompt].item()
        assert got == pytest.approx(expected, rel=1e-13)
        expected = -sum(t * logsigma(r) for t, r in zip(target, reward, strict=True))
        expected -= sum(logsigma(-r) for r in reward) / there
        got = value("nca_rated", batch, rating_temperature=0.7)[prompt].item()
        assert got == pytest.approx(expected, rel=1e-13)


# What holds of every loss.


def columns_with_gradient(name: str, batch: ScoredBatch) -> list[int]:
    # So small a beta keeps every margin inside the hinge.
    (gradient,) = torch.autograd.grad(value(name, batch, beta=0.01).sum(), batch.logp_PC)
    return gradient[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_goes_through_the_candidates_it_declares(name: str) -> None:
    batch = scored(random_logps(1, 5), [[2, 4]])
    expected = {"drawn": [0, 2, 4], "pool": [0, 1, 2, 3, 4]}[LOSSES[name].negatives]
    assert columns_with_gradient(name, batch) == ([0] if name == "sft" else expected)
    assert columns_with_gradient(name, over_pool(batch)) == ([0] if name == "sft" else [*range(5)])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_looks_at_the_reference_if_it_says_so(name: str) -> None:
    batch = scored(random_logps(1, 5), [[2, 4]])
    other = replace(batch, ref_logp_PC=batch.ref_logp_PC * 1.1)
    same = torch.equal(value(name, batch, beta=0.01), value(name, other, beta=0.01))
    assert same != LOSSES[name].reference


@pytest.mark.parametrize("name", LOSSES)
def test_ratings_are_asked_for_by_the_losses_that_say_so(name: str) -> None:
    batch = scored(random_logps(1, 5), [[2, 4]], rating_PC=None)
    if LOSSES[name].ratings:
        with pytest.raises(ValueError, match=f"{name} needs a rating of every candidate, got a"):
            value(name, batch)
    else:
        assert value(name, batch).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_masked_draws_change_nothing(name: str) -> None:
    logp = random_logps(1, 4)
    alone = value(name, scored(logp, [[2]]))
    padded = value(name, scored(logp, [[2, 1, 3]], [[True, False, False]]))
    torch.testing.assert_close(alone, padded, rtol=0, atol=0)
    if LOSSES[name].negatives == "drawn":
        (gradient,) = torch.autograd.grad(padded.sum(), logp)
        assert gradient[0, [1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_absent_candidates_change_nothing(name: str) -> None:
    """As where another prompt of the batch has a larger pool."""
    logp = random_logps(1, 4)
    mask = torch.tensor([[True, True, True, False]])
    wide = scored(logp, [[2]], mask_PC=mask)
    parts = ("logp_PC", "ref_logp_PC", "length_PC", "mask_PC", "rating_PC")
    narrow = replace(wide, **{part: getattr(wide, part)[:, :3] for part in parts})
    torch.testing.assert_close(value(name, wide), value(name, narrow), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(value(name, wide).sum(), logp)
    assert gradient[0, 3] == 0
    assert gradient.isfinite().all()


UNTRAINED = {
    **dict.fromkeys(("mcpo", "rnce"), math.log(3)),
    "mcpo_unbiased": math.log(4),
    **dict.fromkeys(("dpo", "cdpo", "robust"), math.log(2)),
    "rpo": math.log(2) + 2.0,
    # The divergence of a fair coin from the smoothed labels.
    "exo": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    "hinge": 1.0,
    **dict.fromkeys(("ipo", "ipo_sum"), 1 / 0.6**2),
    "sppo": 2 / 0.6**2,
    **dict.fromkeys(("bco", "nca", "nca_rated"), 2 * math.log(2)),
    **dict.fromkeys(("kto", "apo_zero", "apo_down"), 1.0),
    "infonca": math.log(4),
    # Without a reference it depends on the policy: here every token has the same probability.
    "simpo": -0.9 * math.log(sigma(-0.5)) - 0.1 * math.log(sigma(0.5)),
    "cpo": math.log(2) + 2.0,
    "orpo": 0.3 * math.log(2) + 2.0,
    "sft": 2.0,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_value_of_an_untrained_policy(name: str) -> None:
    """Policy and reference are one, baselines 0."""
    logp = torch.full((2, 4), -9.0, dtype=torch.float64)
    batch = scored(
        logp,
        [[1, 3], [2, 1]],
        ref_logp_PC=logp,
        length_PC=torch.full((2, 4), 5),
        baselines=Baselines(),
    )
    assert value(name, batch).tolist() == pytest.approx([UNTRAINED[name]] * 2, rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_log_probabilities_stay_finite(name: str, dtype: torch.dtype) -> None:
    for chosen, other in itertools.product((0.0, -1e-30, -1e4), (0.0, -1e4)):
        logp = torch.tensor([[chosen, other, -5.0]], dtype=dtype, requires_grad=True)
        batch = scored(logp, [[1, 2]], ref_logp_PC=torch.tensor([[-1e4, 0.0, -5.0]], dtype=dtype))
        loss = value(name, batch)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        assert loss.isfinite().all()
        assert loss.dtype == dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str) -> None:
    def loss(logp: torch.Tensor) -> torch.Tensor:
        return value(name, scored(logp, [[1, 2]]))

    assert torch.autograd.gradcheck(loss, (random_logps(1, 4),))


# Of these, whatever the rewards, the chosen is raised and every negative lowered.
RAISES_THE_CHOSEN = ("mcpo", "rnce", "mcpo_unbiased", "dpo", "rpo", "robust", "bco", "kto")
RAISES_THE_CHOSEN = (*RAISES_THE_CHOSEN, "apo_zero", "orpo", "sft")


@pytest.mark.parametrize("name", RAISES_THE_CHOSEN)
def test_the_gradient_raises_the_chosen_and_lowers_the_negatives(name: str) -> None:
    logp = random_logps(40, 4)
    batch = scored(logp, [[1, 2], [3, 1], [2, 3], [1, 3]] * 10)
    (gradient,) = torch.autograd.grad(value(name, batch).sum(), logp)
    assert (gradient[:, 0] < 0).all()
    drawn = gradient.gather(1, batch.negative_PM)
    assert (drawn == 0).all() if name == "sft" else (drawn > 0).all()


@pytest.mark.parametrize("name", ["simpo", "cpo"])
def test_without_smoothing_these_raise_the_chosen_too(name: str) -> None:
    logp = random_logps(4, 3)
    batch = scored(logp, [[1, 2], [2, 1], [1, 2], [2, 1]])
    (gradient,) = torch.autograd.grad(value(name, batch, label_smoothing=0.0).sum(), logp)
    assert (gradient[:, 0] < 0).all()
    assert (gradient.gather(1, batch.negative_PM) > 0).all()


def test_a_loss_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"loss_type must be one of mcpo, .*, sft, got 'dpoo'"):
        loss_named("dpoo")


@pytest.mark.parametrize("name", ["sft", "rpo", "cpo", "orpo"])
def test_an_nll_without_the_length_of_the_step_is_refused(name: str) -> None:
    batch = scored(random_logps(1, 3), [[1]], mean_chosen_length=None)
    with pytest.raises(ValueError, match="needs the mean length of the chosen completions of the"):
        value(name, batch)


def test_terms_carry_their_weights_and_the_nll_comes_last() -> None:
    config = config_of("dpo", sft_weight=0.2)
    assert [(term.name, term.weight) for term in terms_of(config)] == [("dpo", 1.0), ("sft", 0.2)]
    both = replace(CONFIGS["dpo"], loss_type=("bco", "sft"), loss_weights=(0.8, 3.0))
    assert [(term.name, term.weight) for term in terms_of(both)] == [("bco", 0.8), ("sft", 3.0)]
