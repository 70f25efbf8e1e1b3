"""torch's own varlen kernel, ``torch.nn.attention.varlen``: CUDA, 16 bits, no further package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcpo_kernels.prefix_attention import gather

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.prefix_attention.gather import Bounds
    from mcpo_kernels.prefix_attention.layout import PrefixLayout
    from mcpo_kernels.prefix_attention.scores import ScoreRule


def lacks(rule: ScoreRule) -> str | None:
    """What of the rule torch's kernel cannot do; None if nothing."""
    if rule.softcap is not None:
        return "softcap"
    return "sinks" if rule.sinks_H is not None else None


def attend(
    query_HTD: Tensor, key_HTD: Tensor, value_HTE: Tensor, layout: PrefixLayout, rule: ScoreRule
) -> Tensor:
    """[H, T, E] in the dtype of the query."""
    return gather.attend(query_HTD, key_HTD, value_HTE, layout, rule, _varlen)


def _varlen(
    query_THD: Tensor, key_KHD: Tensor, value_KHD: Tensor, bounds: Bounds, rule: ScoreRule
) -> Tensor:
    # Not at the top: it imports torch's compiler, and Triton with it.
    from torch.nn.attention import varlen as torch_varlen

    output = torch_varlen.varlen_attn(
        query_THD,
        key_KHD,
        value_KHD,
        bounds.queries,
        bounds.keys,
        bounds.most_queries,
        bounds.most_keys,
        scale=rule.scale,
        # Keys to the left of the query's own, and none to the right.
        window_size=(-1 if rule.window is None else rule.window - 1, 0),
        enable_gqa=query_THD.shape[1] != key_KHD.shape[1],
    )
    # A pair only where the log-sum-exp is asked for.
    assert not isinstance(output, tuple)
    return output
