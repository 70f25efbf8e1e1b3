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

from mcpo_kernels.prefix_attention.plan import make_plan
from mcpo_kernels.prefix_attention.scores import widen

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from mcpo_kernels.prefix_attention.layout import PrefixLayout
    from mcpo_kernels.prefix_attention.plan import Piece
    from mcpo_kernels.prefix_attention.scores import ScoreRule

# Of the explicit softmax: half of a [L, L] square is spared for L of a few blocks, and the GEMMs
# stay large.
EXPLICIT_BLOCK = 256
# Of a window: at least so many queries share the keys that a block of them sees.
MIN_WINDOW_BLOCK = 128


def attend(
    query_HTD: Tensor, key_HTD: Tensor, value_HTE: Tensor, layout: PrefixLayout, rule: ScoreRule
) -> Tensor:
    """[H, T, E] in the dtype of the query."""
    if layout.num_tokens == 0:
        # No piece, yet gradients (of zero) are owed to every input.
        return _explicit_attention(query_HTD[None], key_HTD[None], value_HTE[None], rule)[0]
    explicit = rule.softcap is not None or rule.sinks_H is not None
    plan = make_plan(layout, rule.window, _block(rule.window, explicit=explicit))
    # Split once and gather by concatenation: the backward of either costs what is copied, that
    # of a slice or an index costs a whole [H, T, D], and an index adds up in any order on CUDA.
    queries = query_HTD.split(plan.part_lengths, dim=1)
    keys = key_HTD.split(plan.part_lengths, dim=1)
    values = value_HTE.split(plan.part_lengths, dim=1)
    outputs: dict[int, Tensor] = {}
    for group in plan.groups:
        query_BHLD = torch.stack([_join(queries, piece.queries) for piece in group])
        key_BHKD = torch.stack([_join(keys, piece.keys) for piece in group])
        value_BHKE = torch.stack([_join(values, piece.keys) for piece in group])
        attention = _explicit_attention if explicit else _torch_attention
        output_BHLE = attention(query_BHLD, key_BHKD, value_BHKE, rule)
        outputs.update(zip(_first_parts(group), output_BHLE.unbind(0), strict=True))
    return torch.cat([outputs[first] for first in sorted(outputs)], dim=1)


def _block(window: int | None, *, explicit: bool) -> int | None:
    """Queries of a piece at most."""
    if explicit:
        return EXPLICIT_BLOCK
    return None if window is None else max(window, MIN_WINDOW_BLOCK)


def _join(parts: tuple[Tensor, ...], numbers: Iterable[int]) -> Tensor:
    chosen = [parts[number] for number in numbers]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)


def _first_parts(group: tuple[Piece, ...]) -> list[int]:
    return [piece.queries.start for piece in group]


def _torch_attention(
    query_BHLD: Tensor, key_BHKD: Tensor, value_BHKE: Tensor, rule: ScoreRule
) -> Tensor:
    """Attention by torch's own kernel, which wants values as wide as keys to be fast."""
    num_values, width = value_BHKE.shape[-1], max(query_BHLD.shape[-1], value_BHKE.shape[-1])
    mask_LK = _end_aligned_mask(query_BHLD, key_BHKD, rule.window)
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
    mask_LK = _end_aligned_mask(query_BHLD, key_BHKD, rule.window)
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


def _end_aligned_mask(query_BHLD: Tensor, key_BHKD: Tensor, window: int | None) -> Tensor | None:
    """[L, K] bool, the last query at the last key; None where it is the plain causal square."""
    num_queries, num_keys = query_BHLD.shape[2], key_BHKD.shape[2]
    if num_queries == num_keys and (window is None or window >= num_keys):
        return None
    mask_LK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BHLD.device)
    mask_LK = mask_LK.tril(num_keys - num_queries)
    return mask_LK if window is None else mask_LK.triu(num_keys - num_queries - window + 1)
