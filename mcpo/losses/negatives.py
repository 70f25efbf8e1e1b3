"""What losses share: rewards, the completions they contrast, the mean over negatives."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mcpo.records import ScoredBatch


def log_ratios(batch: ScoredBatch) -> Tensor:
    """[P, C] rho = logp - ref_logp; 0 where there is no candidate."""
    return batch.logp_PC - batch.ref_logp_PC


def rewards(batch: ScoredBatch, beta: float) -> Tensor:
    """[P, C] r = beta * rho; 0 where there is no candidate."""
    return beta * log_ratios(batch)


def mean_logps(batch: ScoredBatch) -> Tensor:
    """[P, C] logp / length, the mean over the tokens of each completion."""
    return batch.logp_PC / batch.length_PC


def contrasted(value_PC: Tensor, batch: ScoredBatch) -> tuple[Tensor, Tensor]:
    """Values of the chosen, [P, 1], and of the negatives, [P, M]."""
    return value_PC[:, :1], value_PC.gather(1, batch.negative_PM)


def mean_over_negatives(value_PM: Tensor, batch: ScoredBatch) -> Tensor:
    """[P] the mean over the negatives that a prompt has."""
    value_PM = value_PM.masked_fill(~batch.negative_mask_PM, 0.0)
    return value_PM.sum(dim=1) / batch.negative_mask_PM.sum(dim=1)


def with_chosen(value_PC: Tensor, batch: ScoredBatch, absent: float) -> Tensor:
    """[P, 1 + M] the value of the chosen, then of the negatives, ``absent`` where there is none."""
    chosen_P1, negative_PM = contrasted(value_PC, batch)
    return torch.cat([chosen_P1, negative_PM.masked_fill(~batch.negative_mask_PM, absent)], dim=1)


def over_pool(batch: ScoredBatch) -> ScoredBatch:
    """The same batch with every candidate of the pool as a negative."""
    columns_M = torch.arange(1, batch.mask_PC.shape[1], device=batch.mask_PC.device)
    return replace(
        batch,
        negative_PM=columns_M.expand(len(batch.mask_PC), -1),
        negative_mask_PM=batch.mask_PC[:, 1:],
    )
