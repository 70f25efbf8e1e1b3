"""The definition: attention under a dense mask in plain torch, computed in float32 or float64.

The oracle of the other implementations; it holds [H, T, T] scores.
"""
# H query heads, Hkv key heads, T packed tokens, D of queries and keys, E of values

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.prefix_attention.layout import PrefixLayout
    from mcpo_kernels.prefix_attention.scores import ScoreRule


def attend(
    query_HTD: Tensor, key_HTD: Tensor, value_HTE: Tensor, layout: PrefixLayout, rule: ScoreRule
) -> Tensor:
    """[H, T, E] in the dtype of the query."""
    dtype = torch.promote_types(query_HTD.dtype, torch.float32)
    group = query_HTD.shape[0] // key_HTD.shape[0]
    key_HTD = key_HTD.repeat_interleave(group, 0).to(dtype)
    value_HTE = value_HTE.repeat_interleave(group, 0).to(dtype)
    score_HTT = rule.scale * query_HTD.to(dtype) @ key_HTD.mT
    if rule.softcap is not None:
        score_HTT = rule.softcap * torch.tanh(score_HTT / rule.softcap)
    seen_TT = visible(layout, rule.window, query_HTD.device)
    score_HTT = score_HTT.masked_fill(~seen_TT, -torch.inf)
    if rule.sinks_H is not None:
        sink_HT1 = rule.sinks_H.to(dtype)[:, None, None].expand(-1, score_HTT.shape[1], 1)
        score_HTT = torch.cat([score_HTT, sink_HT1], dim=2)
    weight_HTT = torch.softmax(score_HTT, dim=2)[..., : seen_TT.shape[1]]
    return (weight_HTT @ value_HTE).to(query_HTD.dtype)


def visible(layout: PrefixLayout, window: int | None, device: torch.device) -> Tensor:
    """[T, T] bool: whether the token of a row sees the token of a column."""
    token_T = torch.arange(layout.num_tokens, device=device).split(layout.lengths)
    seen_TT = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool, device=device)
    for segment, own_L in enumerate(token_T):
        chain_K = torch.cat([*(token_T[above] for above in layout.ancestors(segment)), own_L])
        position_K = torch.arange(len(chain_K), device=device)
        distance_LK = position_K[len(chain_K) - len(own_L) :, None] - position_K
        near_LK = distance_LK >= 0
        if window is not None:
            near_LK &= distance_LK < window
        seen_TT[own_L[:, None], chain_K] = near_LK
    return seen_TT
