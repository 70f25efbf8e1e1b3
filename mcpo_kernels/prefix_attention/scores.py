"""How a query weighs the keys it sees; the same for every implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


class ScoreRule(NamedTuple):
    """weights = softmax(softcap(scale * query @ key)), over the keys seen and the sink."""

    scale: float
    window: int | None
    """Keys at distance 0 .. window - 1 along the chain of ancestors are seen; None for all."""
    softcap: float | None
    """c in c * tanh(z / c), or None."""
    sinks_H: Tensor | None
    """Per head the logit of a key without value, or None."""


def widen(tensor: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension, up to ``width``: they add nothing to a score."""
    missing = width - tensor.shape[-1]
    return functional.pad(tensor, (0, missing)) if missing else tensor


def of_no_tokens(query_HTD: Tensor, key_HTD: Tensor, value_HTE: Tensor, rule: ScoreRule) -> Tensor:
    """[H, 0, E]: nothing to compute, yet gradients (of zero) are owed to every input."""
    owed = query_HTD.sum() + key_HTD.sum() + value_HTE.sum()
    if rule.sinks_H is not None:
        owed = owed + rule.sinks_H.sum()
    return owed.to(query_HTD.dtype) * query_HTD.new_zeros(len(query_HTD), 0, value_HTE.shape[-1])
