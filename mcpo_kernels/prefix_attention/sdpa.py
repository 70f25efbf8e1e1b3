"""One torch attention call for all pieces of one shape; the prefix's keys are gathered in front.

No [T, T] mask exists and the cost follows the pairs that attend: a window or an explicit softmax
cuts long runs into blocks of queries. Softcap and sinks, which ``scaled_dot_product_attention``
lacks, go through an explicit softmax in float32 (float64 for float64).
"""
# B pieces of a group, L queries and K keys of a piece, H query heads, D of queries and keys,
# E of values

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from mcpo_kernels.prefix_attention import cpu
from mcpo_kernels.prefix_attention.pieces import end_aligned_mask, stacked, window_block
from mcpo_kernels.prefix_attention.plan import make_plan
from mcpo_kernels.prefix_attention.scores import widen

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.prefix_attention.layout import PrefixLayout
    from mcpo_kernels.prefix_attention.scores import ScoreRule

# Of the explicit softmax: half of a [L, L] square is spared for L of a few blocks, and the GEMMs
# stay large.
EXPLICIT_BLOCK = 256


def attend(
    query_HTD: Tensor, key_HTD: Tensor, value_HTE: Tensor, layout: PrefixLayout, rule: ScoreRule
) -> Tensor:
    """[H, T, E] in the dtype of the query."""
    if layout.num_tokens == 0:
        # No piece, yet gradients (of zero) are owed to every input.
        return _explicit_attention(query_HTD[None], key_HTD[None], value_HTE[None], rule)[0]
    explicit = rule.softcap is not None or rule.sinks_H is not None
    if query_HTD.device.type == "cpu" and not explicit:
        return cpu.attend(query_HTD, key_HTD, value_HTE, layout, rule)[0].transpose(0, 1)
    attention = _explicit_attention if explicit else _torch_attention
    block = EXPLICIT_BLOCK if explicit else window_block(rule.window)
    plan = make_plan(layout, rule.window, block)
    outputs: dict[int, Tensor] = {}
    for first_parts, tensors in stacked(query_HTD, key_HTD, value_HTE, plan):
        outputs.update(zip(first_parts, attention(*tensors, rule).unbind(0), strict=True))
    return torch.cat([outputs[first] for first in sorted(outputs)], dim=1)


def _torch_attention(
    query_BHLD: Tensor, key_BHKD: Tensor, value_BHKE: Tensor, rule: ScoreRule
) -> Tensor:
    """Attention by torch's own kernel, which wants values as wide as keys to be fast."""
    num_values, width = value_BHKE.shape[-1], max(query_BHLD.shape[-1], value_BHKE.shape[-1])
    mask_LK = end_aligned_mask(query_BHLD, key_BHKD, rule.window)
    output_BHLE = functional.scaled_dot_product_attention(
        widen(query_BHLD, width),
        widen(key_BHKD, width),
        widen(value_BHKE, width),
        attn_mask=mask_LK,
        is_causal=mask_LK is None,
        scale=rule.scale,
        enable_gqa=query_BHLD.shape[1] != key_BHKD.shape[1],
    )
    return output_BHLE[..., :num_values]


def _explicit_attention(
    query_BHLD: Tensor, key_BHKD: Tensor, value_BHKE: Tensor, rule: ScoreRule
) -> Tensor:
    """Attention with the softmax written out; G query heads share each of the H key heads."""
    dtype = torch.promote_types(query_BHLD.dtype, torch.float32)
    num_key_heads = key_BHKD.shape[1]
    query_BHGLD = query_BHLD.to(dtype).unflatten(1, (num_key_heads, -1))
    score_BHGLK = rule.scale * query_BHGLD @ key_BHKD.to(dtype)[:, :, None].mT
    if rule.softcap is not None:
        score_BHGLK = rule.softcap * torch.tanh(score_BHGLK / rule.softcap)
    mask_LK = end_aligned_mask(query_BHLD, key_BHKD, rule.window)
    if mask_LK is None:
        mask_LK = torch.ones_like(score_BHGLK[0, 0, 0], dtype=torch.bool).tril()
    score_BHGLK = score_BHGLK.masked_fill(~mask_LK, -torch.inf)
    if rule.sinks_H is not None:
        sink_HG11 = rule.sinks_H.to(dtype).view(num_key_heads, -1, 1, 1)
        sink_BHGL1 = sink_HG11.expand(*score_BHGLK.shape[:1], -1, -1, score_BHGLK.shape[3], 1)
        score_BHGLK = torch.cat([score_BHGLK, sink_BHGL1], dim=-1)
    weight_BHGLK = torch.softmax(score_BHGLK, dim=-1)[..., : key_BHKD.shape[2]]
    output_BHGLE = weight_BHGLK @ value_BHKE.to(dtype)[:, :, None]
    return output_BHGLE.flatten(1, 2).to(query_BHLD.dtype)
