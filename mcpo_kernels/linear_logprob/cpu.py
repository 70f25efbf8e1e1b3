"""The compiled head for CPUs: the ops of ``csrc/`` behind the interface of ``chunked``.

Algorithm, memory and promises are in docs/kernels.md.
"""
# N scored tokens, D hidden, V vocabulary

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from mcpo_kernels.linear_logprob.head import Gradients, Head, Needs, Saved

if TYPE_CHECKING:
    from torch import Tensor

BUILD = (
    "python -m pip install --no-build-isolation --editable . builds it where there is a C++ "
    "compiler"
)
# The products of csrc/vector.inc in the place of oneDNN's, as on a machine that lacks those.
PORTABLE = False


def _load() -> tuple[bool, str]:
    """Register the ops; returns whether they can run, and with what or why not."""
    try:
        importlib.import_module("mcpo_kernels._C")
    except ImportError as error:
        return False, f"the C++ extension cannot be loaded ({error}); {BUILD}"
    return True, f"compiled kernel: {torch.ops.mcpo_cpu.capability()}"


AVAILABLE, REASON = _load()


def forward(hidden_ND: Tensor, target_N: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(logp [N], lse [N]), lse being the log of the sum of exponentials of all logits of a row."""
    return torch.ops.mcpo_cpu.forward(
        hidden_ND, head.weight_VD, target_N, head.bias_V, head.softcap, head.scale, PORTABLE
    )


def backward(grad_N: Tensor, saved: Saved, head: Head, needs: Needs) -> Gradients:
    """Gradients from those of logp; rows where ``grad_N`` is zero are left out of every product."""
    gradients = torch.ops.mcpo_cpu.backward(
        grad_N,
        saved.hidden_ND,
        head.weight_VD,
        saved.target_N,
        head.bias_V,
        saved.logp_N,
        saved.lse_N,
        head.softcap,
        head.scale,
        *needs,
        PORTABLE,
    )
    return Gradients(*(g if need else None for g, need in zip(gradients, needs, strict=True)))
