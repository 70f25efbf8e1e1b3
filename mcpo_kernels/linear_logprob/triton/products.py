"""Backward, step 2: what a slab of dz contributes to the gradients, two plain matrix products.

    dhidden [M, D] += dz weight           inner axis: the columns of the slab
    dweight [slab, D] = dz^T hidden       inner axis: the M rows with gradient

Memory. dhidden is added up in float32; a program owns its tile, reads it at the beginning, goes on
adding where the last slab ended, and writes it back. A slab of dweight is summed in registers over
all rows and written once in its own dtype, so there is no [V, D] buffer in float32.

Numerics. Sums are float32 and in an order that tiles alone decide. Since dhidden continues its
sum, its bits do not depend on how wide the slabs are. No atomics.
"""
# N rows, D hidden, V columns of the slab
# Triton types the arguments of a kernel at its launch.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from mcpo_kernels.linear_logprob.triton.dlogits import row_length
from mcpo_kernels.linear_logprob.triton.logits import block_pair, starts


# The arguments of a kernel are flat.
@triton.jit(do_not_specialize=["num_tokens"])
def dhidden_kernel(  # noqa: PLR0913
    dz_ptr,
    weight_ptr,
    count_ptr,
    sum_ptr,
    num_tokens,
    num_columns,
    num_hidden,
    first_column,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum [BLOCK_N, BLOCK_D] += dz weight; the first slab finds nothing to add to."""
    row_block, hidden_block = block_pair(
        tl.program_id(0), tl.cdiv(num_tokens, BLOCK_N), tl.cdiv(num_hidden, BLOCK_D), GROUP
    )
    count = tl.load(count_ptr).to(tl.int32)
    if row_block * BLOCK_N >= count:
        return
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = hidden_block * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    mask_n, mask_d = offs_n < count, offs_d < num_hidden
    mask = mask_n[:, None] & mask_d[None, :]
    dz_ptrs = dz_ptr + starts(offs_n, row_length(num_columns))[:, None] + offs_v[None, :]
    weight_ptrs = weight_ptr + starts(offs_v, num_hidden)[:, None] + offs_d[None, :]
    sum_ptrs = sum_ptr + starts(offs_n, num_hidden)[:, None] + offs_d[None, :]

    continued = tl.full((BLOCK_N,), first_column, dtype=tl.int32) > 0
    total = tl.load(sum_ptrs, mask=mask & continued[:, None], other=0.0)
    for begin in range(0, num_columns, BLOCK_V):
        mask_v = offs_v < num_columns - begin
        dz = tl.load(dz_ptrs, mask=mask_n[:, None] & mask_v[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=mask_v[:, None] & mask_d[None, :], other=0.0)
        total = tl.dot(dz, weight, total, input_precision=PRECISION)
        dz_ptrs += BLOCK_V
        weight_ptrs += starts(BLOCK_V, num_hidden)
    tl.store(sum_ptrs, total, mask=mask)


# The arguments of a kernel are flat.
@triton.jit
def dweight_kernel(  # noqa: PLR0913
    dz_ptr,
    hidden_ptr,
    count_ptr,
    dweight_ptr,
    num_columns,
    num_hidden,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dweight [BLOCK_V, BLOCK_D] = dz^T hidden; 0 where no row has gradient."""
    column_block, hidden_block = block_pair(
        tl.program_id(0), tl.cdiv(num_columns, BLOCK_V), tl.cdiv(num_hidden, BLOCK_D), GROUP
    )
    count = tl.load(count_ptr).to(tl.int32)
    offs_v = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = hidden_block * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    mask_v, mask_d = offs_v < num_columns, offs_d < num_hidden
    length = row_length(num_columns)
    dz_ptrs = dz_ptr + starts(offs_n, length)[:, None] + offs_v[None, :]
    hidden_ptrs = hidden_ptr + starts(offs_n, num_hidden)[:, None] + offs_d[None, :]

    total = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    for begin in range(0, count, BLOCK_N):
        mask_n = offs_n < count - begin
        dz = tl.load(dz_ptrs, mask=mask_n[:, None] & mask_v[None, :], other=0.0)
        hidden = tl.load(hidden_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        total = tl.dot(tl.trans(dz), hidden, total, input_precision=PRECISION)
        dz_ptrs += starts(BLOCK_N, length)
        hidden_ptrs += starts(BLOCK_N, num_hidden)
    dweight_ptrs = dweight_ptr + starts(offs_v, num_hidden)[:, None] + offs_d[None, :]
    mask = mask_v[:, None] & mask_d[None, :]
    tl.store(dweight_ptrs, total.to(dweight_ptr.dtype.element_ty), mask=mask)
