"""The rows with gradient, side by side, without the host ever knowing how many they are.

A row whose upstream gradient is 0 contributes nothing. The others, M of N, are put in front on the
device: their indices are sorted, their number stays in device memory. Buffers have room for all
N; kernels read M and leave what is behind it alone. Nothing waits for the device, so the backward
can be captured in a CUDA graph.

Two kernels move rows of D numbers: gather reads no row without gradient, not even to ignore it;
scatter writes the rows of dhidden where they belong, rounded once.
"""
# N scored tokens, M of them with gradient, D hidden
# Triton types the arguments of a kernel at its launch.
# pyright: reportMissingParameterType=false, reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from mcpo_kernels.linear_logprob.triton.launch import OPTIONS
from mcpo_kernels.linear_logprob.triton.logits import starts

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.linear_logprob.head import Saved

BLOCK_ROWS, BLOCK_D = 16, 256


class Rows(NamedTuple):
    """The M rows with gradient in front; what stands behind them means nothing."""

    row_N: Tensor
    """int64, where they were; ascending."""
    count_1: Tensor
    """int64, M."""
    hidden_ND: Tensor
    target_N: Tensor
    number_N3: Tensor
    """float32: lse, upstream gradient, and the gradient of the target's logit."""


@triton.jit
def gather_kernel(
    hidden_ptr, row_ptr, count_ptr, gathered_ptr, num_hidden,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gathered[m] = hidden[row[m]] for m < count."""
    offs_m, offs_d, mask = _block(count_ptr, num_hidden, BLOCK_N, BLOCK_D)
    row = tl.load(row_ptr + offs_m, mask=offs_m < tl.load(count_ptr), other=0)
    hidden = tl.load(
        hidden_ptr + starts(row, num_hidden)[:, None] + offs_d[None, :], mask=mask, other=0.0
    )
    to_ptrs = gathered_ptr + starts(offs_m, num_hidden)[:, None] + offs_d[None, :]
    tl.store(to_ptrs, hidden, mask=mask)


@triton.jit
def scatter_kernel(
    sum_ptr, row_ptr, count_ptr, dhidden_ptr, num_hidden,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dhidden[row[m]] = sum[m] for m < count, in the dtype of dhidden."""
    offs_m, offs_d, mask = _block(count_ptr, num_hidden, BLOCK_N, BLOCK_D)
    row = tl.load(row_ptr + offs_m, mask=offs_m < tl.load(count_ptr), other=0)
    total = tl.load(
        sum_ptr + starts(offs_m, num_hidden)[:, None] + offs_d[None, :], mask=mask, other=0.0
    )
    to_ptrs = dhidden_ptr + starts(row, num_hidden)[:, None] + offs_d[None, :]
    tl.store(to_ptrs, total.to(dhidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _block(count_ptr, num_hidden, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    # Blocks of D are the fast axis: a row is read from end to end.
    num_blocks = tl.cdiv(num_hidden, BLOCK_D)
    program = tl.program_id(0)
    offs_m = program // num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = program % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_m < tl.load(count_ptr))[:, None] & (offs_d < num_hidden)[None, :]
    return offs_m, offs_d, mask


def rows_with_gradient(grad_N: Tensor, saved: Saved) -> Rows:
    """The rows whose upstream gradient is not 0; a NaN is not 0."""
    without_N = grad_N == 0
    # A stable sort of whether to leave a row out: no scatter, whose order nobody could promise.
    row_N = without_N.to(torch.uint8).argsort(stable=True)
    count_1 = grad_N.shape[0] - without_N.sum(0, keepdim=True)
    grad_N = grad_N[row_N]
    # 1 - p from log p: exact where p is so near 1 that the difference would round to 0.
    target_grad_N = -grad_N * saved.scores.logp_N[row_N].expm1()
    number_N3 = torch.stack((saved.scores.lse_N[row_N], grad_N, target_grad_N), 1)
    hidden_ND = saved.hidden_ND.contiguous()
    gathered_ND = torch.empty_like(hidden_ND)
    gather_kernel[_grid(hidden_ND)](
        hidden_ptr=hidden_ND,
        row_ptr=row_N,
        count_ptr=count_1,
        gathered_ptr=gathered_ND,
        num_hidden=hidden_ND.shape[1],
        BLOCK_N=BLOCK_ROWS,
        BLOCK_D=BLOCK_D,
        **OPTIONS,
    )
    return Rows(row_N, count_1, gathered_ND, saved.target_N[row_N], number_N3)


def scatter(sum_ND: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """The gradients of the rows at their places, zeros elsewhere."""
    dhidden_ND = torch.zeros_like(sum_ND, dtype=dtype)
    scatter_kernel[_grid(sum_ND)](
        sum_ptr=sum_ND,
        row_ptr=rows.row_N,
        count_ptr=rows.count_1,
        dhidden_ptr=dhidden_ND,
        num_hidden=sum_ND.shape[1],
        BLOCK_N=BLOCK_ROWS,
        BLOCK_D=BLOCK_D,
        **OPTIONS,
    )
    return dhidden_ND


def _grid(matrix_ND: Tensor) -> tuple[int]:
    num_tokens, num_hidden = matrix_ND.shape
    return (triton.cdiv(num_tokens, BLOCK_ROWS) * triton.cdiv(num_hidden, BLOCK_D),)
