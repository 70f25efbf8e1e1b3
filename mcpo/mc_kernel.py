"""Stage 6, the MC kernel: draw hard negatives from the policy's own scores.

Algorithm 1 of the paper (arXiv 2502.04567): weights w = softmax(score) over the dispreferred pool,
the negative z ~ Categorical(w), redrawn at every step under the current policy, without gradient.
The chosen completion is not among the candidates of a draw.

Draws are Gumbel-max with counter-based noise: the noise of a row depends on (seed, step, row id)
alone, so the same scores draw the same negatives whatever the world size, the packing, the order
of rows, or a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcpo.config import KernelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """The drawn negatives and what the kernel knew when it drew them."""

    negative_PM: Tensor
    """[P, M] int64, columns in [1, C)."""
    mask_PM: Tensor
    """[P, M] bool, False where the pool was used up (without replacement only)."""
    ess_P: Tensor
    """[P] effective sample size of the weights, 1 / sum w^2: 1 is a sure draw, C - 1 uniform."""
    rank_PM: Tensor
    """[P, M] float, place of the draw in its pool by score: 1 is the hardest negative."""


def candidate_scores(
    logp_PC: Tensor, ref_logp_PC: Tensor, length_PC: Tensor, *, score: str, beta: float
) -> Tensor:
    """[P, C] the score that a strategy weighs; ``log_ratio`` is the paper's secret reward beta*rho.

    The paper's wording admits all four readings: ``log_ratio`` is uniform at step 0, ``logp`` is
    dominated by length.
    """
    match score:
        case "log_ratio":
            return beta * (logp_PC - ref_logp_PC)
        case "logp_scaled":
            return beta * logp_PC
        case "logp":
            return logp_PC
        case "mean_logp":
            return logp_PC / length_PC
        case _:
            raise ValueError(
                f"score must be log_ratio, logp_scaled, logp or mean_logp, got {score!r}"
            )


def gumbel_noise(
    seed: int, step: int, row_ids: Sequence[str], *, num_draws: int, num_candidates: int
) -> Tensor:
    """[P, num_draws, num_candidates] float64 standard Gumbel noise, one stream per (seed, step, row
    id).

    A row's noise for a candidate does not depend on how many candidates other rows have.
    """
    noise = np.empty((len(row_ids), num_candidates, num_draws))
    for row, row_id in enumerate(row_ids):
        key = hashlib.sha256(f"{seed}/{step}/{row_id}".encode()).digest()[:16]
        stream = np.random.Philox(key=int.from_bytes(key, "little"))
        # Candidates vary slowest, so that a wider batch only appends to a row's stream.
        raw = stream.random_raw(num_candidates * num_draws)
        noise[row] = _gumbel(raw).reshape(noise[row].shape)
    return torch.from_numpy(noise).transpose(1, 2)


def _gumbel(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """From raw 64-bit numbers: numpy promises their stream across versions, Generator's not."""
    # 52 bits: with 53 the half would round the largest number up to 1, whose noise is infinite.
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log(uniform))


def sample_negatives(
    score_PC: Tensor, mask_PC: Tensor, config: KernelConfig, noise_PMC: Tensor
) -> Draw:
    """Draw M negatives per prompt from its pool, columns 1.. where ``mask_PC`` holds.

    Args:
        score_PC: [P, C], detached here; column 0 (the chosen) is never drawn.
        mask_PC: [P, C] bool; every row must hold at least one negative.
        config: strategy, M, replacement, temperature.
        noise_PMC: [P, M, C] from ``gumbel_noise``; ``max`` and ``min`` ignore it.

    Returns:
        A ``Draw``. Without replacement a pool of fewer than M negatives yields them all, the rest
        masked. ``max`` and ``min`` take the M best or worst; ``random`` ignores the scores.
    """
    score_PC = score_PC.detach().double()
    in_pool_PC = mask_PC.clone()
    in_pool_PC[:, 0] = False
    logit_PC = (score_PC / config.temperature).masked_fill(~in_pool_PC, -torch.inf)
    weight_PC = torch.softmax(logit_PC, dim=1)
    key_PMC = _sort_keys(logit_PC, in_pool_PC, config, noise_PMC)
    if config.strategy in ("mc", "random") and config.replacement:
        negative_PM = key_PMC.argmax(dim=2)
        mask_PM = torch.ones_like(negative_PM, dtype=torch.bool)
    else:
        negative_PM, mask_PM = _top(key_PMC[:, 0], in_pool_PC, config.num_negatives)
    order_PC = logit_PC.argsort(dim=1, descending=True, stable=True)
    place_PC = order_PC.argsort(dim=1).double() + 1
    return Draw(
        negative_PM=negative_PM,
        mask_PM=mask_PM,
        ess_P=1.0 / weight_PC.square().sum(dim=1),
        rank_PM=place_PC.gather(1, negative_PM),
    )


def _sort_keys(
    logit_PC: Tensor, in_pool_PC: Tensor, config: KernelConfig, noise_PMC: Tensor
) -> Tensor:
    """[P, M, C] keys whose largest entries are the draws; -inf outside the pool."""
    match config.strategy:
        case "mc":
            # Gumbel-max: argmax of logit + noise is a draw from softmax(logit); the M largest are M
            # successive draws without replacement.
            return logit_PC[:, None, :] + noise_PMC
        case "random":
            return noise_PMC.masked_fill(~in_pool_PC[:, None, :], -torch.inf)
        case "max":
            return logit_PC[:, None, :]
        case "min":
            return (-logit_PC).masked_fill(~in_pool_PC, -torch.inf)[:, None, :]


def _top(key_PC: Tensor, in_pool_PC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest keys of each row, and which of them exist."""
    order_PC = key_PC.argsort(dim=1, descending=True, stable=True)
    pool_size_P = in_pool_PC.sum(dim=1)
    width = min(count, key_PC.shape[1] - 1)
    negative_PM = order_PC[:, :width]
    mask_PM = torch.arange(width, device=key_PC.device) < pool_size_P[:, None]
    # A masked draw still indexes a column: any negative will do, the loss ignores it.
    return negative_PM.where(mask_PM, 1), mask_PM
