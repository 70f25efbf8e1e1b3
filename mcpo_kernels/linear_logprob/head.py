"""The language-model head as the implementations see it, and what they owe.

An implementation is a module with

- ``forward(hidden_ND, target_N, head, allowance) -> Scores``: log-probabilities of the targets
  under the whole head; every target is one of its columns;
- ``partial(hidden_ND, target_N, head, allowance) -> Partial``: what the columns at hand say of
  each row, for a head of which they are a slab;
- ``backward(grad_N, saved, head, filter_mass, needs) -> Gradients``: from the gradients of logp,
  of either; ``saved.scores`` holds logp and lse of the *whole* vocabulary;
- ``kept_panels(num_tokens, num_vocab, dtype, allowance)``: how many panels of each kind the first
  two keep.

``partial`` and ``backward`` meet targets outside the slab: below 0, or not below the number of rows
of ``head.weight_VD``, at most the size of a vocabulary away. Such a target is no column of the
slab. Nothing is read or written at it and nothing is raised, ``Partial.target_logit_N`` may hold
anything in its row, and its row has no onehot in the backward: the gradient of its logits is -g p
in every column. ``forward`` meets no such target. Slabs have at least one row; the ops deal
with empty ones.
"""

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


class Partial(NamedTuple):
    """What a slab of the vocabulary says of each row; the last two as in ``Scores``."""

    max_N: Tensor
    """Largest logit."""
    sum_N: Tensor
    """Of exp(z - max) over the columns of the slab."""
    target_logit_N: Tensor
    """Anything where the target is no column of the slab."""
    logits_PNC: Tensor
    panel_lse_NQ: Tensor
    """Of the panels of the slab."""


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


def finish(max_N: Tensor, sum_N: Tensor, target_logit_N: Tensor) -> tuple[Tensor, Tensor]:
    """Logp and lse from what all columns together say of each row."""
    log_sum_N = sum_N.log()
    # Not target_logit - lse: the difference of the large terms first loses nothing.
    return (target_logit_N - max_N) - log_sum_N, max_N + log_sum_N


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
