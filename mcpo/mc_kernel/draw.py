"""One draw for each prompt of a batch whose whole pool is scored."""
# P prompts, M negatives, C candidates

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mcpo.config import KernelConfig
from mcpo.mc_kernel.chains import run_chains


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """The drawn negatives and what the kernel knew when it drew them."""

    negative_PM: Tensor
    """[P, M] int64, columns in [1, C)."""
    mask_PM: Tensor
    """[P, M] bool, False where the pool was used up (without replacement only)."""
    ess_P: Tensor
    """[P] effective sample size of the weights, 1 / sum w^2: 1 is a sure draw, C - 1 uniform."""
    entropy_P: Tensor
    """[P] of the weights, in nats: 0 is a sure draw, log(C - 1) uniform."""
    rank_PM: Tensor
    """[P, M] float, place of the draw in its pool by score: 1 is the hardest negative."""
    chain: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """[P] each, under the names that are logged: what a chain did, where there is one."""


def sample_negatives(
    score_PC: Tensor, mask_PC: Tensor, config: KernelConfig, noise_PDC: Tensor
) -> Draw:
    """Draw M negatives per prompt from its pool, columns 1.. where ``mask_PC`` holds.

    Args:
        score_PC: [P, C], detached here; column 0 (the chosen) is never drawn.
        mask_PC: [P, C] bool; every row must hold at least one negative.
        config: strategy, M, replacement, temperature, chain.
        noise_PDC: [P, D, C] from ``gumbel_noise``, D of ``draws_needed``; ``max`` and ``min``
            ignore it.

    Returns:
        A ``Draw``. Without replacement a pool of fewer than M negatives yields them all, the rest
        masked. ``max`` and ``min`` take the M best or worst; ``random`` ignores the scores.
    """
    score_PC = score_PC.detach().double()
    in_pool_PC = mask_PC.clone()
    in_pool_PC[:, 0] = False
    logit_PC = (score_PC / config.temperature).masked_fill(~in_pool_PC, -torch.inf)
    chain: dict[str, Tensor] = {}
    if config.chain != "none":
        negative_PM, chain["mc/acceptance"] = run_chains(logit_PC, in_pool_PC, config, noise_PDC)
        mask_PM = torch.ones_like(negative_PM, dtype=torch.bool)
    else:
        key_PDC = _sort_keys(logit_PC, in_pool_PC, config, noise_PDC)
        if config.strategy in ("mc", "random") and config.replacement:
            negative_PM = key_PDC.argmax(dim=2)
            mask_PM = torch.ones_like(negative_PM, dtype=torch.bool)
        else:
            negative_PM, mask_PM = _top(key_PDC[:, 0], in_pool_PC, config.num_negatives)
    ess_P, entropy_P = spread(logit_PC)
    return Draw(
        negative_PM=negative_PM,
        mask_PM=mask_PM,
        ess_P=ess_P,
        entropy_P=entropy_P,
        rank_PM=places(logit_PC).gather(1, negative_PM),
        chain=chain,
    )


def spread(logit_PC: Tensor) -> tuple[Tensor, Tensor]:
    """[P] effective sample size and [P] entropy of softmax(logit)."""
    weight_PC = torch.softmax(logit_PC, dim=1)
    return 1.0 / weight_PC.square().sum(dim=1), torch.special.entr(weight_PC).sum(dim=1)


def places(logit_PC: Tensor) -> Tensor:
    """[P, C] each candidate's place in its pool by score, from 1; equals in their order."""
    order_PC = logit_PC.argsort(dim=1, descending=True, stable=True)
    return order_PC.argsort(dim=1).double() + 1


def _sort_keys(
    logit_PC: Tensor, in_pool_PC: Tensor, config: KernelConfig, noise_PDC: Tensor
) -> Tensor:
    """[P, D, C] keys whose largest entries are the draws; -inf outside the pool."""
    match config.strategy:
        case "mc":
            # Gumbel-max: argmax of logit + noise is a draw from softmax(logit); the M largest are M
            # successive draws without replacement.
            return logit_PC[:, None, :] + noise_PDC
        case "random":
            return noise_PDC.masked_fill(~in_pool_PC[:, None, :], -torch.inf)
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
