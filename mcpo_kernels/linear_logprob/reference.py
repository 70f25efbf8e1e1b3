"""The definition: log softmax of the head's logits, gathered at the targets, in plain torch.

The oracle every implementation is measured against. It holds all [N, V] logits and leaves the
gradients to autograd. Float64 inputs are computed in float64, all others in float32.
"""
# N scored tokens, D hidden, V vocabulary

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcpo_kernels.linear_logprob.head import Head, accumulation_dtype

if TYPE_CHECKING:
    from torch import Tensor


def token_logprobs(hidden_ND: Tensor, target_N: Tensor, head: Head) -> Tensor:
    """Logp [N] of each row's target."""
    dtype = accumulation_dtype(hidden_ND.dtype)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logit_NV = hidden_ND.to(dtype) @ head.weight_VD.to(dtype).T
        if head.bias_V is not None:
            logit_NV = logit_NV + head.bias_V.to(dtype)
        logit_NV = head.scale * logit_NV
        if head.softcap is not None:
            logit_NV = head.softcap * torch.tanh(logit_NV / head.softcap)
        return torch.log_softmax(logit_NV, dim=1).gather(1, target_N[:, None]).squeeze(1)
