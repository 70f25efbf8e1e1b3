"""AdamW and its schedule, from torch and transformers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import get_scheduler

from mcpo.config import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in which matrices decay and vectors (biases, norms) do not."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in trainable if parameter.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in trainable if parameter.dim() < 2],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


# Of transformers' schedules, those that are stepped with a metric.
_NEEDS_MORE_THAN_A_STEP = ("reduce_lr_on_plateau", "greedy")


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule of transformers by its name.

    Raises:
        ValueError: there is no schedule of that name, or it does not follow from the step alone.
    """
    if config.lr_scheduler_type in _NEEDS_MORE_THAN_A_STEP:
        raise ValueError(
            "lr_scheduler_type must name a schedule that follows from the step alone, "
            f"got {config.lr_scheduler_type!r}"
        )
    try:
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=round(config.warmup_ratio * total_steps),
            num_training_steps=total_steps,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "lr_scheduler_type must be a schedule of transformers (linear, cosine, constant...), "
            f"got {config.lr_scheduler_type!r} ({error})"
        ) from error
