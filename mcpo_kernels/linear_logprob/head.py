"""The language-model head as the implementations see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Head(NamedTuple):
    """logits = softcap(scale * (hidden @ weight.T + bias)), softcap(z) = c * tanh(z / c)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    """c, or None for no cap."""
    scale: float


class Needs(NamedTuple):
    """Which gradients a backward has to compute."""

    hidden: bool
    weight: bool
    bias: bool


class Saved(NamedTuple):
    """What forward leaves for backward besides the head."""

    hidden_ND: Tensor
    target_N: Tensor
    logp_N: Tensor
    lse_N: Tensor


class Gradients(NamedTuple):
    """Gradients in the dtype of what they belong to, None where not needed."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype logits are accumulated and log-probabilities returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
