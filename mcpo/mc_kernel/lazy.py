"""The lazy kernel: one persistent chain per prompt, which needs few candidates scored.

Candidates are proposed by stale weights q = softmax(last known score), so that the chosen one, the
chain's state z and the proposals z' alone need a score under the current policy, w. A proposal is
accepted with probability

    min(1, (w(z') / q(z')) / (w(z) / q(z)))

which is independence Metropolis-Hastings: w is stationary whatever q is, and where q is w every
proposal is accepted and the draw is one from w. The q of the current state is that of the moment of
the proposal too, not the one that the state was once proposed by (docs/math.md, "The lazy kernel").
"""
# P prompts, C packed candidates, F candidates of the full group, M chains, K proposals of each

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mcpo.config import KernelConfig
from mcpo.mc_kernel.draw import Draw, places, spread
from mcpo.mc_kernel.noise import log_uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class LazyBatch:
    """What the chains bring to a batch of which they chose the candidates."""

    known_PF: Tensor
    """[P, F] float64, the last known score of every candidate of the full groups; anything outside
    the pool."""
    in_pool_PF: Tensor
    """[P, F] bool, never True in column 0."""
    age_PF: Tensor
    """[P, F] int64, steps since that score was taken."""
    column_PC: Tensor
    """[P, C] int64, the place of each packed candidate in its full group."""
    state_PM: Tensor
    """[P, M] int64, where the chains stand, in places of the full group."""
    proposal_PMK: Tensor
    """[P, M, K] int64, what they are offered one after the other, likewise."""
    log_u_PMK: Tensor
    """[P, M, K] float64, logarithms of the uniform numbers that decide."""

    def to(self, device: torch.device) -> LazyBatch:
        """The same on a device."""
        return LazyBatch(
            **{each.name: getattr(self, each.name).to(device) for each in fields(self)}
        )


def propose(
    known_PF: Tensor, in_pool_PF: Tensor, config: KernelConfig, noise_PDF: Tensor
) -> tuple[Tensor, Tensor]:
    """[P, M, K] candidates drawn by stale weights, and [P, M, K] what decides about each."""
    num_P, _, num_F = noise_PDF.shape
    noise_PMK2F = noise_PDF.view(num_P, config.num_negatives, config.chain_steps, 2, num_F)
    logit_PF = _logits(known_PF, in_pool_PF, config)
    proposal_PMK = (logit_PF[:, None, None] + noise_PMK2F[:, :, :, 0]).argmax(dim=3)
    return proposal_PMK, log_uniform(noise_PMK2F[:, :, :, 1, 0])


def lazy_draw(score_PC: Tensor, mask_PC: Tensor, lazy: LazyBatch, config: KernelConfig) -> Draw:
    """Move every chain by its proposals; where it ends is its negative.

    Args:
        score_PC: [P, C] of the packed candidates under the current policy, detached here.
        mask_PC: [P, C] bool.
        lazy: of the same batch.
        config: temperature.

    Returns:
        A ``Draw`` whose effective sample size, entropy and ranks are those of the whole pool by
        what is known of it now: fresh scores of the packed candidates, stale ones of the others.
    """
    fresh_PF = with_fresh(lazy, score_PC, mask_PC)
    # log(w / q), but for a constant of the row.
    gain_PF = (fresh_PF - lazy.known_PF) / config.temperature
    state_PM = lazy.state_PM
    accepted_PM = torch.zeros_like(state_PM, dtype=torch.float64)
    for proposal_PM, log_u_PM in zip(
        lazy.proposal_PMK.unbind(dim=2), lazy.log_u_PMK.unbind(dim=2), strict=True
    ):
        ratio_PM = gain_PF.gather(1, proposal_PM) - gain_PF.gather(1, state_PM)
        accept_PM = log_u_PM < ratio_PM
        state_PM = proposal_PM.where(accept_PM, state_PM)
        accepted_PM += accept_PM
    logit_PF = _logits(fresh_PF, lazy.in_pool_PF, config)
    ess_P, entropy_P = spread(logit_PF)
    packed_PMC = lazy.column_PC[:, None] == state_PM[:, :, None]
    return Draw(
        negative_PM=(packed_PMC & mask_PC[:, None]).to(torch.int64).argmax(dim=2),
        mask_PM=torch.ones_like(state_PM, dtype=torch.bool),
        ess_P=ess_P,
        entropy_P=entropy_P,
        rank_PM=places(logit_PF).gather(1, state_PM),
        chain={
            "mc/acceptance": accepted_PM.mean(dim=1) / lazy.proposal_PMK.shape[2],
            "mc/staleness": _pool_mean(lazy.age_PF.double(), lazy.in_pool_PF),
            "mc/drift": _pool_mean((fresh_PF - lazy.known_PF).abs(), _packed_pool(lazy, mask_PC)),
        },
    )


def with_fresh(lazy: LazyBatch, score_PC: Tensor, mask_PC: Tensor) -> Tensor:
    """[P, F] what is known once the packed candidates have their scores."""
    score_PC = score_PC.detach().double()
    # What is absent stands at place 0, the chosen one's, of which nothing is to be known.
    kept_PC = lazy.known_PF.gather(1, lazy.column_PC)
    fresh_PC = score_PC.where(mask_PC & (lazy.column_PC > 0), kept_PC)
    return lazy.known_PF.scatter(1, lazy.column_PC, fresh_PC)


def next_weights(lazy: LazyBatch, fresh_PF: Tensor, config: KernelConfig) -> Tensor:
    """[P, M, F] the distribution of where each chain will stand, given where it stands."""
    stale_PF = torch.softmax(_logits(lazy.known_PF, lazy.in_pool_PF, config), dim=1)
    gain_PF = (fresh_PF - lazy.known_PF).masked_fill(~lazy.in_pool_PF, 0.0) / config.temperature
    # Row: from, column: to.
    accept_PFF = (gain_PF[:, None, :] - gain_PF[:, :, None]).exp().clamp(max=1.0)
    move_PFF = stale_PF[:, None, :] * accept_PFF
    move_PFF = move_PFF - torch.diag_embed(move_PFF.diagonal(dim1=1, dim2=2))
    stay_PF = 1.0 - move_PFF.sum(dim=2)
    step_PFF = move_PFF + torch.diag_embed(stay_PF)
    here_PMF = torch.nn.functional.one_hot(lazy.state_PM, stale_PF.shape[1]).double()
    for _ in range(config.chain_steps):
        here_PMF = here_PMF @ step_PFF
    return here_PMF


def audit(lazy: LazyBatch, fresh_PF: Tensor, config: KernelConfig) -> dict[str, Tensor]:
    """[P] each: total variation to w, once the whole pool has fresh scores.

    ``mc/lazy_tv`` is that of the lazy kernel's next state, averaged over chains, ``mc/stale_tv``
    that of the stale weights which it proposes by.
    """
    weight_PF = torch.softmax(_logits(fresh_PF, lazy.in_pool_PF, config), dim=1)
    stale_PF = torch.softmax(_logits(lazy.known_PF, lazy.in_pool_PF, config), dim=1)
    next_PMF = next_weights(lazy, fresh_PF, config)
    lazy_tv_PM = (next_PMF - weight_PF[:, None]).abs().sum(dim=2) / 2
    return {
        "mc/lazy_tv": lazy_tv_PM.mean(dim=1),
        "mc/stale_tv": (stale_PF - weight_PF).abs().sum(dim=1) / 2,
    }


def _logits(score_PF: Tensor, in_pool_PF: Tensor, config: KernelConfig) -> Tensor:
    return (score_PF / config.temperature).masked_fill(~in_pool_PF, -torch.inf)


def _packed_pool(lazy: LazyBatch, mask_PC: Tensor) -> Tensor:
    """[P, F] bool, the pool's candidates that are packed."""
    times_PF = torch.zeros_like(lazy.age_PF)
    times_PF = times_PF.scatter_add(1, lazy.column_PC, mask_PC.to(times_PF.dtype))
    return (times_PF > 0) & lazy.in_pool_PF


def _pool_mean(value_PF: Tensor, where_PF: Tensor) -> Tensor:
    """[P] the mean over some of each row, at least one."""
    return value_PF.masked_fill(~where_PF, 0.0).sum(dim=1) / where_PF.sum(dim=1)
