"""The compiled head for CPUs: the ops of ``csrc/`` behind the interface of ``chunked``.

Algorithm, memory and promises are in docs/kernels.md.
"""
# N scored tokens, D hidden, V vocabulary

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from mcpo_kernels.linear_logprob.head import (
    PANEL,
    Allowance,
    Gradients,
    Head,
    Needs,
    Partial,
    Saved,
    Scores,
    accumulation_dtype,
)

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


def forward(hidden_ND: Tensor, target_N: Tensor, head: Head, allowance: Allowance) -> Scores:
    """Log-probabilities, and what the allowance lets the backward find again."""
    return Scores(*torch.ops.mcpo_cpu.forward(*_arguments(hidden_ND, target_N, head, allowance)))


def partial(hidden_ND: Tensor, target_N: Tensor, head: Head, allowance: Allowance) -> Partial:
    """What the columns of ``head`` say of each row, and what the backward may find again."""
    return Partial(*torch.ops.mcpo_cpu.partial(*_arguments(hidden_ND, target_N, head, allowance)))


def _arguments(
    hidden_ND: Tensor, target_N: Tensor, head: Head, allowance: Allowance
) -> tuple[Any, ...]:
    num_tokens, num_vocab = hidden_ND.shape[0], head.weight_VD.shape[0]
    cached_panels, lse_panels = kept_panels(num_tokens, num_vocab, hidden_ND.dtype, allowance)
    return (
        hidden_ND,
        head.weight_VD,
        target_N,
        head.bias_V,
        head.softcap,
        head.scale,
        cached_panels,
        lse_panels > 0,
        PORTABLE,
    )


def kept_panels(
    num_tokens: int, num_vocab: int, dtype: torch.dtype, allowance: Allowance
) -> tuple[int, int]:
    """Panels of the vocabulary whose logits are kept, and panels whose log-sum-exp is."""
    num_panels = (num_vocab + PANEL - 1) // PANEL
    panel_bytes = num_tokens * PANEL * accumulation_dtype(dtype).itemsize
    # No more than a symbol can be divided into.
    room = min(int(allowance.cache_mb * 2**20), 2**62)
    # sym_: the number of tokens may be a symbol under torch.compile, which is no int.
    cached: Any = torch.sym_min(num_panels, room // torch.sym_max(panel_bytes, 1))
    return cached, num_panels if allowance.filter_mass > 0 else 0


def backward(
    grad_N: Tensor, saved: Saved, head: Head, filter_mass: float, needs: Needs
) -> Gradients:
    """Gradients from those of logp; rows where ``grad_N`` is zero are left out of every product."""
    gradients = torch.ops.mcpo_cpu.backward(
        grad_N,
        saved.hidden_ND,
        head.weight_VD,
        saved.target_N,
        head.bias_V,
        *saved.scores,
        head.softcap,
        head.scale,
        filter_mass,
        *needs,
        PORTABLE,
    )
    return Gradients(*(g if need else None for g, need in zip(gradients, needs, strict=True)))
