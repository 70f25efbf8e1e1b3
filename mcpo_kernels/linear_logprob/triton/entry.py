"""The head for GPUs behind the interface of ``chunked``; algorithm and memory in docs/triton.md.

Of this package only this file is imported with ``mcpo_kernels``. The kernels, and Triton with
them, are imported when they first run.
"""
# N scored tokens, D hidden, V vocabulary

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

from mcpo_kernels.linear_logprob.head import PANEL, Allowance

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.linear_logprob.head import Gradients, Head, Needs, Partial, Saved, Scores

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INSTALLED = importlib.util.find_spec("triton") is not None
# Triton decides when kernels are imported, and so once; by the same words.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
# Of an NVIDIA device: the first that multiplies bfloat16.
LEAST_CAPABILITY = 8


def availability() -> tuple[bool, str]:
    """Whether the kernels can run here, and where or why not."""
    if not INSTALLED:
        return False, "triton is not installed; python -m pip install triton"
    if INTERPRETED:
        return True, "Triton's interpreter on the CPU, for tests alone, as TRITON_INTERPRET asks"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA or ROCm device"
    return True, "Triton kernels on a CUDA or ROCm device"


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take such tensors where they are available, or None."""
    if INTERPRETED and device.type != "cpu":
        return f"under TRITON_INTERPRET it takes tensors on the CPU, got {device.type}"
    if not INTERPRETED and device.type != "cuda":
        return f"it takes tensors on a CUDA or ROCm device, got {device.type}"
    if dtype not in DTYPES:
        return f"it takes bfloat16, float16 or float32, got {dtype}"
    if INTERPRETED:
        # Measured in Triton 3.9.
        wrong = "Triton's interpreter multiplies the bits of bfloat16 as if they were integers"
        return wrong if dtype == torch.bfloat16 else None
    if torch.version.hip is None:
        # By properties, which torch.compile can fold; it cannot fold get_device_capability.
        major = torch.cuda.get_device_properties(device).major
        if major < LEAST_CAPABILITY:
            return f"it needs compute capability {LEAST_CAPABILITY}.0 or more, got {major}.x"
    return None


def forward(hidden_ND: Tensor, target_N: Tensor, head: Head, allowance: Allowance) -> Scores:
    """Log-probabilities, and what the allowance lets the backward find again."""
    from mcpo_kernels.linear_logprob.triton import forward as kernels

    sizes = hidden_ND.shape[0], head.weight_VD.shape[0]
    _, lse_panels = kept_panels(*sizes, hidden_ND.dtype, allowance)
    return kernels.forward(hidden_ND, target_N, head, lse_panels)


def partial(hidden_ND: Tensor, target_N: Tensor, head: Head, allowance: Allowance) -> Partial:
    """What the columns of ``head`` say of each row, for a head of which they are a slab."""
    from mcpo_kernels.linear_logprob.triton import forward as kernels

    sizes = hidden_ND.shape[0], head.weight_VD.shape[0]
    _, lse_panels = kept_panels(*sizes, hidden_ND.dtype, allowance)
    return kernels.partial(hidden_ND, target_N, head, lse_panels)


def kept_panels(
    num_tokens: int, num_vocab: int, dtype: torch.dtype, allowance: Allowance
) -> tuple[int, int]:
    """No logits are kept; the log-sum-exp of panels for a filter."""
    return 0, (num_vocab + PANEL - 1) // PANEL if allowance.filter_mass > 0 else 0


def backward(
    grad_N: Tensor, saved: Saved, head: Head, filter_mass: float, needs: Needs
) -> Gradients:
    """Gradients from those of logp; rows where ``grad_N`` is zero are not even read."""
    from mcpo_kernels.linear_logprob.triton import backward as kernels

    return kernels.backward(grad_N, saved, head, filter_mass, needs)
