"""The language-model head as the implementations see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


# Columns of a panel of the vocabulary.
PANEL = 64


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


class Allowance(NamedTuple):
    """What a backward may take up and leave out; an implementation need not make use of it."""

    cache_mb: float
    """MiB of logits that may be kept for it."""
    filter_mass: float
    """Share of what the target does not hold of a row's softmax that its gradient may leave out."""


class Scores(NamedTuple):
    """What forward computes; the last two for backward alone, and empty where not kept."""

    logp_N: Tensor
    lse_N: Tensor
    logits_PNC: Tensor
    """Finished logits of the first P panels of the vocabulary, C = ``PANEL`` columns each."""
    panel_lse_NQ: Tensor
    """Log of the sum of exponentials of each of the Q panels of the whole vocabulary."""


class Saved(NamedTuple):
    """What forward leaves for backward besides the head."""

    hidden_ND: Tensor
    target_N: Tensor
    scores: Scores


class Gradients(NamedTuple):
    """Gradients in the dtype of what they belong to, None where not needed."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def empty_kept(
    hidden_ND: Tensor, cached_panels: int = 0, lse_panels: int = 0
) -> tuple[Tensor, Tensor]:
    """The last two of ``Scores``, not yet written."""
    num_tokens, dtype = hidden_ND.shape[0], accumulation_dtype(hidden_ND.dtype)
    return (
        hidden_ND.new_empty((cached_panels, num_tokens, PANEL), dtype=dtype),
        hidden_ND.new_empty((num_tokens, lse_panels), dtype=dtype),
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype logits are accumulated and log-probabilities returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
