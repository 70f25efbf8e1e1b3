"""Losses of the margin of rewards between the chosen completion and one negative.

d = r_0 - r_z = beta * (rho_0 - rho_z), or as stated; each is the mean over the negatives z.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mcpo.config import LossConfig
from mcpo.losses.negatives import contrasted, log_ratios, mean_over_negatives, rewards
from mcpo.losses.reference_free import sft
from mcpo.records import ScoredBatch


def margins(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P, M] d = r_0 - r_z."""
    chosen_P1, negative_PM = contrasted(rewards(batch, config.beta), batch)
    return chosen_P1 - negative_PM


def dpo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -log sigma(d).

    Rafailov et al. 2023, arXiv 2305.18290, equation 7. TRL: ``sigmoid``.
    """
    return mean_over_negatives(-F.logsigmoid(margins(batch, config)), batch)


def rpo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -log sigma(d) + rpo_alpha * NLL, the NLL of the chosen as in ``sft``.

    Liu et al. 2024, arXiv 2405.16436; Pang et al. 2024, arXiv 2404.19733. TRL: ``[sigmoid, sft]``.
    """
    return dpo(batch, config) + config.rpo_alpha * sft(batch, config)


def cdpo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -(1 - e) log sigma(d) - e log sigma(-d), e = label_smoothing.

    Conservative DPO: e is the probability that a label is wrong. Mitchell 2023,
    ericmitchell.ai/cdpo.pdf. Least where sigma(d) = 1 - e; ``dpo`` for e = 0.
    """
    margin_PM, smoothing = margins(batch, config), config.label_smoothing
    right_PM, wrong_PM = -F.logsigmoid(margin_PM), -F.logsigmoid(-margin_PM)
    return mean_over_negatives((1 - smoothing) * right_PM + smoothing * wrong_PM, batch)


def robust(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] ( -(1 - e) log sigma(d) + e log sigma(-d) ) / (1 - 2 e), e = label_smoothing < 1/2.

    Its mean over labels that are wrong with probability e is ``dpo`` of the right ones. Chowdhury
    et al. 2024, arXiv 2403.00409. TRL: ``robust``.
    """
    margin_PM, smoothing = margins(batch, config), config.label_smoothing
    right_PM, wrong_PM = -F.logsigmoid(margin_PM), -F.logsigmoid(-margin_PM)
    unbiased_PM = ((1 - smoothing) * right_PM - smoothing * wrong_PM) / (1 - 2 * smoothing)
    return mean_over_negatives(unbiased_PM, batch)


def exo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] sigma(d) (log sigma(d) - log(1 - e)) + sigma(-d) (log sigma(-d) - log e).

    The reverse KL divergence of (sigma(d), sigma(-d)) from the labels (1 - e, e), e =
    label_smoothing > 0. Ji et al. 2024, arXiv 2402.00856, equation 16. TRL: ``exo_pair``.
    """
    margin_PM, smoothing = margins(batch, config), config.label_smoothing
    won_PM = torch.sigmoid(margin_PM) * (F.logsigmoid(margin_PM) - math.log1p(-smoothing))
    lost_PM = torch.sigmoid(-margin_PM) * (F.logsigmoid(-margin_PM) - math.log(smoothing))
    return mean_over_negatives(won_PM + lost_PM, batch)


def hinge(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] max(0, 1 - d).

    Zhao et al. 2023 (SLiC), arXiv 2305.10425, in the form of Liu et al. 2023 (RSO), arXiv
    2309.06657. TRL: ``hinge``.
    """
    return mean_over_negatives(F.relu(1 - margins(batch, config)), batch)


def ipo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] (rho_0 / |y_0| - rho_z / |y_z| - 1 / (2 beta))^2, log-ratios per token.

    Azar et al. 2023, arXiv 2310.12036, equation 17, beta as its tau. The division by the length is
    that of TRL's ``ipo``, which names the authors for it; ``ipo_sum`` has none.
    """
    chosen_P1, negative_PM = contrasted(log_ratios(batch) / batch.length_PC, batch)
    miss_PM = chosen_P1 - negative_PM - 1 / (2 * config.beta)
    return mean_over_negatives(miss_PM.square(), batch)


def ipo_sum(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] (rho_0 - rho_z - 1 / (2 beta))^2, log-ratios of whole completions.

    Azar et al. 2023, arXiv 2310.12036, equation 17, beta as its tau.
    """
    chosen_P1, negative_PM = contrasted(log_ratios(batch), batch)
    miss_PM = chosen_P1 - negative_PM - 1 / (2 * config.beta)
    return mean_over_negatives(miss_PM.square(), batch)
