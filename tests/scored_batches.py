"""Batches for the tests of losses: what a loss sees, made up, in float64."""

from __future__ import annotations

from typing import Any

import torch

from mcpo.config import LOSS_TYPES, SMOOTHED, LossConfig
from mcpo.records import Baselines, ScoredBatch


def config_of(name: str, **options: Any) -> LossConfig:
    """Of one loss, smoothed where it can be."""
    smoothing = {"label_smoothing": 0.1} if name in SMOOTHED else {}
    return LossConfig(loss_type=(name,), **({"beta": 0.3} | smoothing | options))


CONFIGS = {name: config_of(name) for name in LOSS_TYPES}


def scored(
    logp: torch.Tensor,
    negatives: list[list[int]],
    drawn: list[list[bool]] | None = None,
    **fields: Any,
) -> ScoredBatch:
    """References, lengths, ratings and baselines are made up, the same for the same shape."""
    generator = torch.Generator().manual_seed(5)
    ref = torch.randn(logp.shape, generator=generator, dtype=logp.dtype) * 3 - 10
    negative = torch.tensor(negatives)
    made_up: dict[str, Any] = {
        "logp_PC": logp,
        "ref_logp_PC": ref,
        "length_PC": torch.randint(2, 9, logp.shape, generator=generator),
        "mask_PC": torch.ones(logp.shape, dtype=torch.bool),
        "negative_PM": negative,
        "negative_mask_PM": torch.ones_like(negative, dtype=torch.bool)
        if drawn is None
        else torch.tensor(drawn),
        "mean_chosen_length": 4.5,
        "rating_PC": torch.randn(logp.shape, generator=generator, dtype=torch.float64),
        "baselines": Baselines(delta=0.2, z0=0.3),
    }
    return ScoredBatch(**(made_up | fields))


def random_logps(prompts: int, candidates: int, seed: int = 0) -> torch.Tensor:
    """A leaf, of log-ratios that are far from 0."""
    generator = torch.Generator().manual_seed(seed)
    logp = torch.randn(prompts, candidates, generator=generator, dtype=torch.float64) * 3 - 10
    return logp.requires_grad_()
