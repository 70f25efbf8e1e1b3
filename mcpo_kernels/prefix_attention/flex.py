"""FlexAttention: a block mask of the layout, no gathered keys; compiled, and so for CUDA.

Softcap is a ``score_mod``. Sinks take part afterwards: with the log-sum-exp of the scores, lse, the
sink s scales what came out by exp(lse) / (exp(lse) + exp(s)) = sigmoid(lse - s). On the CPU torch
has a forward alone, uncompiled.
"""
# T tokens, P of them with padding, S segments, H heads, D of queries and keys, E of values

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from mcpo_kernels.prefix_attention.scores import of_no_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from mcpo_kernels.prefix_attention.layout import PrefixLayout
    from mcpo_kernels.prefix_attention.scores import ScoreRule

# Blocks of the kernel; a row is padded to whole ones, so that few lengths are ever compiled.
BLOCK = 128


def attend(
    query_HTD: Tensor, key_HTD: Tensor, value_HTE: Tensor, layout: PrefixLayout, rule: ScoreRule
) -> Tensor:
    """[H, T, E] in the dtype of the query.

    Raises:
        RuntimeError: gradients are asked for on the CPU.
    """
    tensors = (query_HTD, key_HTD, value_HTE)
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if wants_gradient and query_HTD.device.type == "cpu":
        raise RuntimeError(
            "impl='flex' cannot run here: FlexAttention has no backward on the CPU; use 'sdpa', or "
            "torch.no_grad"
        )
    num_tokens = layout.num_tokens
    if num_tokens == 0:
        return of_no_tokens(*tensors, rule)
    missing = -num_tokens % BLOCK
    query_1HPD, key_1HPD, value_1HPE = (
        functional.pad(tensor, (0, 0, 0, missing))[None] for tensor in tensors
    )
    function: Any = _compiled() if query_HTD.device.type == "cuda" else flex_attention
    output_1HPE, aux = function(
        query_1HPD,
        key_1HPD,
        value_1HPE,
        score_mod=_capped(rule.softcap) if rule.softcap is not None else None,
        block_mask=block_mask(layout, rule.window, query_HTD.device),
        scale=rule.scale,
        enable_gqa=query_HTD.shape[0] != key_HTD.shape[0],
        return_aux=AuxRequest(lse=True),
    )
    output_HTE = output_1HPE[0, :, :num_tokens]
    if rule.sinks_H is None:
        return output_HTE
    share_HT = torch.sigmoid(aux.lse[0, :, :num_tokens] - rule.sinks_H[:, None])
    return (output_HTE * share_HT[..., None]).to(query_HTD.dtype)


# Made once for all layers of all micro-batches that are under way; models mix two windows at most.
@lru_cache(maxsize=8)
def block_mask(layout: PrefixLayout, window: int | None, device: torch.device) -> BlockMask:
    """Of the padded row; padding sees itself alone."""
    num_segments, num_tokens = len(layout.lengths), layout.num_tokens
    padded = num_tokens + -num_tokens % BLOCK
    length_S = torch.tensor(layout.lengths, device=device)
    first_S = torch.tensor([layout.prefix_length(s) for s in range(num_segments)], device=device)
    segment_T = torch.arange(num_segments, device=device).repeat_interleave(length_S)
    # Of its own sequence: ancestors first.
    position_T = torch.arange(num_tokens, device=device)
    position_T = position_T + (first_S - length_S.cumsum(0) + length_S)[segment_T]
    sees_SS = torch.eye(num_segments + 1, dtype=torch.bool, device=device)
    for segment in range(num_segments):
        sees_SS[segment, list(layout.ancestors(segment))] = True
    segment_P = functional.pad(segment_T, (0, padded - num_tokens), value=num_segments)
    position_P = functional.pad(position_T, (0, padded - num_tokens))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        seen = (key <= query) & sees_SS[segment_P[query], segment_P[key]]
        return seen if window is None else seen & (position_P[query] - position_P[key] < window)

    return create_block_mask(sees, None, None, padded, padded, device=str(device))


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head, query, key
        return softcap * torch.tanh(score / softcap)

    return score


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
