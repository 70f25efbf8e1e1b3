"""Losses that look at the chosen completion and several others at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcpo.config import LossConfig
from mcpo.losses.negatives import mean_over_negatives, over_pool, rewards, with_chosen
from mcpo.records import ScoredBatch


def mcpo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -log( e^{r_0} / (e^{r_0} + sum_z e^{r_z}) ) over the negatives z.

    The ranking noise-contrastive estimate of arXiv 2502.04567; with negatives drawn by the MC
    kernel it is MC-PO. One negative gives DPO exactly.
    """
    reward_PN = with_chosen(rewards(batch, config.beta), batch, absent=-torch.inf)
    # log(1 + sum exp(r_z - r_0)) as one logsumexp: exact however large the rewards are.
    return torch.logsumexp(reward_PN - reward_PN[:, :1], dim=1)


def rnce(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] ``mcpo`` under the name that it has with negatives drawn uniformly.

    Chen et al. 2025, arXiv 2502.04567; the same form in Chen et al. 2024 (S-DPO), arXiv 2406.09215.
    """
    return mcpo(batch, config)


def mcpo_unbiased(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] the loss of the whole pool, with a gradient that goes through the drawn alone.

    Value: log(1 + S / e^{r_0}), S the sum of e^{r_j} over the pool. Gradient: that of w * (r_z -
    r_0), z drawn with probability e^{r_z} / S, w = S / (e^{r_0} + S) held fixed; the mean over
    several draws. Its expectation over draws is the gradient of the value: z receives (e^{r_z} / S)
    * w. For draws by ``strategy: mc``, ``score: log_ratio``, temperature 1, with replacement.
    """
    exact_P = mcpo(over_pool(batch), config).detach()
    weight_P = -torch.expm1(-exact_P)
    reward_PC = rewards(batch, config.beta)
    gap_PM = reward_PC.gather(1, batch.negative_PM) - reward_PC[:, :1]
    surrogate_P = weight_P * mean_over_negatives(gap_PM, batch)
    return exact_P + (surrogate_P - surrogate_P.detach())


def infonca(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -sum_i t_i log softmax(r)_i over all candidates i, t = softmax(rating / alpha).

    alpha = rating_temperature. Chen et al. 2024, arXiv 2402.05369. It compares rewards
    with one another, as ``mcpo`` does, which is its limit for alpha to 0 if the chosen one alone is
    rated best.
    """
    target_PN = _targets(batch, config, "infonca")
    reward_PN = with_chosen(rewards(batch, config.beta), batch, absent=-torch.inf)
    logp_PN = torch.log_softmax(reward_PN, dim=1)
    # 0 times the minus infinity of an absent candidate is no number.
    return -(target_PN * logp_PN.masked_fill(target_PN == 0, 0.0)).sum(dim=1)


def nca_rated(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -sum_i t_i log sigma(r_i) - mean_i log sigma(-r_i), t = softmax(rating / alpha).

    Over all candidates i, the chosen one among them; alpha = rating_temperature. Chen et al. 2024,
    arXiv 2402.05369. It judges each reward by itself, and so keeps the likelihood of
    the best from falling. For two candidates and alpha to 0 it is ``nca``.
    """
    target_PN = _targets(batch, config, "nca_rated")
    reward_PN = with_chosen(rewards(batch, config.beta), batch, absent=0.0)
    there_PN = F.pad(batch.negative_mask_PM, (1, 0), value=True)
    up_P = (target_PN * F.logsigmoid(reward_PN)).sum(dim=1)
    down_P = (F.logsigmoid(-reward_PN) * there_PN).sum(dim=1) / there_PN.sum(dim=1)
    return -up_P - down_P


def _targets(batch: ScoredBatch, config: LossConfig, name: str) -> Tensor:
    """[P, 1 + M] softmax(rating / rating_temperature), 0 where there is no candidate."""
    if batch.rating_PC is None:
        raise ValueError(
            f"{name} needs a rating of every candidate, got a batch without; give each completion "
            "of the data a score"
        )
    rating_PN = with_chosen(batch.rating_PC, batch, absent=-torch.inf)
    target_PN = torch.softmax(rating_PN / config.rating_temperature, dim=1)
    return target_PN.to(batch.logp_PC.dtype)
