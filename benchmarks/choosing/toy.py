"""A policy small enough to be followed by eye, trained by the real losses and the real MC kernel.

It chooses among 16 completions of one prompt: pi(y) = softmax(b + F theta)_y, with theta = 0 at the
start, which is the reference. Completion 0 is the chosen one; 1 to 5 are its pool, with features
the more like its own the smaller their number; 6 to 15 are all that is not in the data. As in a
language model, what is similar moves together.
"""
# P prompts (one), C candidates, Y completions, D features

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mcpo.config import Config
from mcpo.losses import over_pool, rewards, terms_of
from mcpo.losses.baselines import RunningBaselines
from mcpo.mc_kernel import candidate_scores, gumbel_noise, sample_negatives
from mcpo.records import ScoredBatch

CANDIDATES, COMPLETIONS, FEATURES = 6, 16, 8
LENGTH = 20
# How like the chosen one each of the pool is: the cosine of their features.
LIKENESS = (0.9, 0.7, 0.5, 0.25, 0.0)
RATINGS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
# The learning rate is such that the first step moves theta by as much, whatever the loss: what is
# compared is where it goes from there, and not its scale.
STEPS, FIRST_STEP = 200, 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What training did."""

    moved_Y: Tensor
    """[Y] log pi after minus before."""
    pool_draws: tuple[float, ...]
    """Share of the draws that went to each of the pool."""
    margin: float
    """Mean over the pool of rho_0 - rho_j."""

    @property
    def outside(self) -> float:
        """Change of the mean log-probability of what is not in the data."""
        return float(self.moved_Y[CANDIDATES:].mean())


def train(config: Config, *, pool: int = CANDIDATES - 1) -> Outcome:
    """Follow the loss of ``config`` for ``STEPS`` steps, with the nearest ``pool`` negatives."""
    bias_Y, feature_YD = policy()
    theta_D = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    start_Y = bias_Y.log_softmax(0)
    running, counts, rate = RunningBaselines(), torch.zeros(CANDIDATES), 0.0
    for step in range(STEPS):
        logp_Y = (bias_Y + feature_YD @ theta_D).log_softmax(0)
        batch = _scored(logp_Y[: 1 + pool], start_Y[: 1 + pool], running, config, step)
        counts += torch.bincount(batch.negative_PM[0], minlength=CANDIDATES)
        used = over_pool(batch) if config.loss.augmented else batch
        loss = torch.stack([t.weight * t.loss(used, config.loss) for t in terms_of(config.loss)])
        (gradient_D,) = torch.autograd.grad(loss.sum(), theta_D)
        rate = rate or FIRST_STEP / float(gradient_D.norm())
        with torch.no_grad():
            theta_D -= rate * gradient_D
        running.update(_means(batch, logp_Y.detach(), start_Y, config), config.loss.baseline_decay)
    moved_Y = ((bias_Y + feature_YD @ theta_D).log_softmax(0) - start_Y).detach()
    return Outcome(
        moved_Y=moved_Y,
        pool_draws=tuple((counts[1:] / counts.sum()).tolist()),
        margin=float(moved_Y[0] - moved_Y[1 : 1 + pool].mean()),
    )


def policy() -> tuple[Tensor, Tensor]:
    """[Y] the reference's logits and [Y, D] features of length 3."""
    generator = torch.Generator().manual_seed(0)
    feature_YD = torch.randn(COMPLETIONS, FEATURES, generator=generator, dtype=torch.float64)
    chosen_D = feature_YD[0] / feature_YD[0].norm()
    for place, likeness in enumerate(LIKENESS, start=1):
        across_D = feature_YD[place] - (feature_YD[place] @ chosen_D) * chosen_D
        across_D = across_D / across_D.norm()
        feature_YD[place] = likeness * chosen_D + (1 - likeness**2) ** 0.5 * across_D
    bias_Y = torch.randn(COMPLETIONS, generator=generator, dtype=torch.float64)
    return bias_Y, 3 * feature_YD / feature_YD.norm(dim=1, keepdim=True)


def _scored(
    logp_C: Tensor, ref_logp_C: Tensor, running: RunningBaselines, config: Config, step: int
) -> ScoredBatch:
    """The group of one prompt with what the MC kernel draws."""
    logp_PC, ref_logp_PC = logp_C[None], ref_logp_C[None]
    length_PC = torch.full(logp_PC.shape, LENGTH)
    mask_PC = torch.ones(logp_PC.shape, dtype=torch.bool)
    noise_PMC = gumbel_noise(
        0, step, ["toy"], num_draws=config.kernel.num_negatives, num_candidates=len(logp_C)
    )
    score_PC = candidate_scores(
        logp_PC.detach(),
        ref_logp_PC,
        length_PC,
        score=config.kernel.score,
        beta=config.loss.beta,
    )
    draw = sample_negatives(score_PC, mask_PC, config.kernel, noise_PMC)
    return ScoredBatch(
        logp_PC=logp_PC,
        ref_logp_PC=ref_logp_PC,
        length_PC=length_PC,
        mask_PC=mask_PC,
        negative_PM=draw.negative_PM,
        negative_mask_PM=draw.mask_PM,
        mean_chosen_length=LENGTH,
        rating_PC=torch.tensor([RATINGS[: len(logp_C)]], dtype=torch.float64),
        baselines=running.values,
    )


def _means(batch: ScoredBatch, logp_Y: Tensor, start_Y: Tensor, config: Config) -> dict[str, float]:
    """What the running means take in; what is not in the data stands for mismatched completions."""
    reward_PC = rewards(batch, config.loss.beta).detach()
    mismatched = config.loss.beta * (logp_Y - start_Y)[CANDIDATES:].mean()
    return {
        "rewards/chosen": float(reward_PC[0, 0]),
        "rewards/rejected": float(reward_PC.gather(1, batch.negative_PM).mean()),
        "kto/mismatched": float(mismatched),
    }
