"""Chains of several steps over a pool whose scores are known: no step costs a forward.

A chain begins in a candidate drawn uniformly, as the pool is a sample of the proposal mu, and its
stationary distribution is w = softmax(score), the one that a draw from the whole pool has at once.

    subset      some of the others are proposed, each set of their number as likely; the next state
                is drawn by w from them and the current one
    metropolis  one candidate z' of the pool is proposed, each as likely; the chain moves to it with
                probability min(1, w' / w)

Both are reversible (docs/math.md, "Chains"). The current state must stay among the candidates:
without it w would not be stationary.
"""
# P prompts, M chains, D draws, C candidates

from __future__ import annotations

import torch
from torch import Tensor

from mcpo.config import KernelConfig
from mcpo.mc_kernel.noise import log_uniform


def run_chains(
    logit_PC: Tensor, in_pool_PC: Tensor, config: KernelConfig, noise_PDC: Tensor
) -> tuple[Tensor, Tensor]:
    """Run M chains for each prompt, independent of one another.

    Args:
        logit_PC: log w but for a constant of the row; -inf outside the pool.
        in_pool_PC: bool, never True in column 0.
        config: kind of chain, steps, proposals.
        noise_PDC: Gumbel noise, ``draws_needed`` numbers for each candidate; that of column 0
            serves decisions.

    Returns:
        [P, M] states at the end, and [P] the share of steps that moved (``subset``) or whose
        proposal was accepted, be it the state itself (``metropolis``).
    """
    num_P, _, num_C = noise_PDC.shape
    noise_PMDC = noise_PDC.view(num_P, config.num_negatives, -1, num_C)
    state_PM = noise_PMDC[:, :, 0].masked_fill(~in_pool_PC[:, None], -torch.inf).argmax(dim=2)
    taken_PM = torch.zeros_like(state_PM, dtype=torch.float64)
    for step in range(config.chain_steps):
        proposing_PMC, deciding_PMC = noise_PMDC[:, :, 1 + 2 * step : 3 + 2 * step].unbind(dim=2)
        if config.chain == "subset":
            proposed_PMC = _subset(state_PM, in_pool_PC, config.proposals_per_step, proposing_PMC)
            key_PMC = (logit_PC[:, None] + deciding_PMC).masked_fill(~proposed_PMC, -torch.inf)
            next_PM = key_PMC.argmax(dim=2)
            taken_PM += next_PM != state_PM
        else:
            in_pool_P1C = in_pool_PC[:, None]
            proposed_PM = proposing_PMC.masked_fill(~in_pool_P1C, -torch.inf).argmax(dim=2)
            gain_PM = logit_PC.gather(1, proposed_PM) - logit_PC.gather(1, state_PM)
            accepted_PM = log_uniform(deciding_PMC[:, :, 0]) < gain_PM
            next_PM = proposed_PM.where(accepted_PM, state_PM)
            taken_PM += accepted_PM
        state_PM = next_PM
    return state_PM, taken_PM.mean(dim=1) / config.chain_steps


def _subset(state_PM: Tensor, in_pool_PC: Tensor, count: int, noise_PMC: Tensor) -> Tensor:
    """[P, M, C] bool: the state, and ``count`` others drawn uniformly, or all where fewer are."""
    is_state_PMC = torch.zeros_like(noise_PMC, dtype=torch.bool).scatter(
        2, state_PM[:, :, None], True
    )
    other_PMC = in_pool_PC[:, None] & ~is_state_PMC
    key_PMC = noise_PMC.masked_fill(~other_PMC, -torch.inf)
    best_PMK = key_PMC.topk(min(count, key_PMC.shape[2]), dim=2).indices
    drawn_PMC = torch.zeros_like(other_PMC).scatter(2, best_PMK, True)
    return (drawn_PMC & other_PMC) | is_state_PMC
