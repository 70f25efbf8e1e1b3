"""Losses that judge each completion by its own reward: chosen ones up, negatives down.

Each is a term of the chosen completion plus the mean over the negatives z of a term of theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcpo.config import LossConfig
from mcpo.losses.negatives import contrasted, log_ratios, mean_over_negatives, rewards
from mcpo.records import ScoredBatch


def bco(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -log sigma(r_0 - delta) - log sigma(-(r_z - delta)).

    delta is the running mean of (r_0 + r_z) / 2 over earlier steps, and 0 in the first
    (``mcpo.losses.baselines``). Jung et al. 2024, arXiv 2404.04656. TRL's ``bco_pair`` leaves delta
    out.
    """
    chosen_P1, negative_PM = contrasted(rewards(batch, config.beta), batch)
    delta = batch.baselines.delta
    loss_PM = -F.logsigmoid(chosen_P1 - delta) - F.logsigmoid(delta - negative_PM)
    return mean_over_negatives(loss_PM, batch)


def kto(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] (1 - sigma(r_0 - z0)) + (1 - sigma(z0 - r_z)), the paired form.

    z0 estimates beta * KL(pi || pi_ref), at least 0: the running mean of the reward of completions
    that belong to another prompt, over earlier steps, and 0 in the first
    (``mcpo.losses.baselines``). Ethayarajh et al. 2024, arXiv 2402.01306. TRL's KTO trainer
    estimates z0 from the micro-batch itself, and counts each completion as an example of its own.
    """
    chosen_P1, negative_PM = contrasted(rewards(batch, config.beta), batch)
    z0 = batch.baselines.z0
    loss_PM = torch.sigmoid(z0 - chosen_P1) + torch.sigmoid(negative_PM - z0)
    return mean_over_negatives(loss_PM, batch)


def apo_zero(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] (1 - sigma(r_0)) + sigma(r_z): for chosen ones better than what the model writes.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7. TRL: ``apo_zero``.
    """
    chosen_P1, negative_PM = contrasted(rewards(batch, config.beta), batch)
    return mean_over_negatives(torch.sigmoid(-chosen_P1) + torch.sigmoid(negative_PM), batch)


def apo_down(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] sigma(r_0) + (1 - sigma(r_0 - r_z)): for chosen ones worse than what the model writes.

    It lowers both, the negative more. D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8. TRL:
    ``apo_down``.
    """
    chosen_P1, negative_PM = contrasted(rewards(batch, config.beta), batch)
    lowered_PM = torch.sigmoid(chosen_P1) + torch.sigmoid(negative_PM - chosen_P1)
    return mean_over_negatives(lowered_PM, batch)


def sppo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] (rho_0 - 1 / (2 beta))^2 + (rho_z + 1 / (2 beta))^2.

    The hard form, where the chosen wins with probability 1. Wu et al. 2024, arXiv 2405.00675,
    equation 4.7. TRL: ``sppo_hard``.
    """
    chosen_P1, negative_PM = contrasted(log_ratios(batch), batch)
    goal = 1 / (2 * config.beta)
    return mean_over_negatives((chosen_P1 - goal).square() + (negative_PM + goal).square(), batch)


def nca(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -log sigma(r_0) - 1/2 log sigma(-r_0) - 1/2 log sigma(-r_z), the form of a pair.

    Chen et al. 2024, arXiv 2402.05369. TRL: ``nca_pair``. For rated candidates see ``nca_rated``.
    """
    chosen_P1, negative_PM = contrasted(rewards(batch, config.beta), batch)
    chosen_P1 = -F.logsigmoid(chosen_P1) - 0.5 * F.logsigmoid(-chosen_P1)
    return mean_over_negatives(chosen_P1 - 0.5 * F.logsigmoid(-negative_PM), batch)
