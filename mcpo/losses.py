"""Stage 7, the losses: pure functions of log-probabilities, one value per prompt.

Notation of docs/math.md: rho = logp - ref_logp (summed over completion tokens), reward r = beta *
rho; index 0 is the chosen completion, the drawn negatives follow. A loss returns [P]; the step
divides the sum by the number of prompts of the whole optimizer step, whatever the batch size,
accumulation or world size.

A new loss is one function of (ScoredBatch, LossConfig) and one line in ``LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mcpo.config import LossConfig
from mcpo.records import ScoredBatch


def rewards(batch: ScoredBatch, beta: float) -> Tensor:
    """[P, C] r = beta * (logp - ref_logp); 0 where there is no candidate."""
    return beta * (batch.logp_PC - batch.ref_logp_PC)


def dpo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -log sigmoid(r_0 - r_z), the mean over the drawn negatives z.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7.
    """
    reward_PC = rewards(batch, config.beta)
    margin_PM = reward_PC[:, :1] - reward_PC.gather(1, batch.negative_PM)
    loss_PM = -F.logsigmoid(margin_PM) * batch.negative_mask_PM
    return loss_PM.sum(dim=1) / batch.negative_mask_PM.sum(dim=1)


def mcpo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -log( e^{r_0} / (e^{r_0} + sum_z e^{r_z}) ) over the drawn negatives z.

    The ranking noise-contrastive estimate of arXiv 2502.04567; with negatives drawn by the MC
    kernel it is MC-PO, drawn uniformly it is RNCE. One negative gives DPO exactly.
    """
    reward_PC = rewards(batch, config.beta)
    chosen_P1 = reward_PC[:, :1]
    gap_PM = reward_PC.gather(1, batch.negative_PM) - chosen_P1
    gap_PM = gap_PM.masked_fill(~batch.negative_mask_PM, -torch.inf)
    # log(1 + sum exp(gap)) as one logsumexp: exact however large the rewards are.
    return torch.logsumexp(torch.cat([torch.zeros_like(chosen_P1), gap_PM], dim=1), dim=1)


Loss = Callable[[ScoredBatch, LossConfig], Tensor]

LOSSES: dict[str, Loss] = {"mcpo": mcpo, "dpo": dpo}


# Losses of the policy's log-probabilities alone; the others are of log-ratios.
WITHOUT_REFERENCE: frozenset[str] = frozenset()


def needs_reference(config: LossConfig) -> bool:
    """Whether the loss depends on the reference's log-probabilities."""
    return config.loss_type not in WITHOUT_REFERENCE


def loss_named(loss_type: str) -> Loss:
    """The loss function of a name.

    Raises:
        ValueError: there is no such loss.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSSES)}, got {loss_type!r}")
    return LOSSES[loss_type]
