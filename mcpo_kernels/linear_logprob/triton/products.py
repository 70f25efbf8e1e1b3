"""Backward, step 2: what a slab of dz contributes to the gradients, two plain matrix products.

    dhidden [M, D] += dz weight           inner axis: the columns of the slab
    dweight [slab, D] = dz^T hidden       inner axis: the M rows with gradient

Memory. dhidden is added up in float32; a program owns its tile, reads it at the beginning, goes on
adding where the last slab ended, and writes it back. A slab of dweight is summed in registers over
all rows and written once in its own dtype, so there is no [V, D] buffer in float32.

With a filter the inner axis has a list of steps for each block of the tile: step_ptr [blocks,
1 + most steps], how many and which (``selection.py``).

Numerics. Sums are float32 and in an order that tiles alone decide. Since dhidden continues its
sum, its bits do not depend on how wide the slabs are. No atomics.
"""
# N rows, D hidden, V vocabulary, W columns of the slab
# Triton types the arguments of a kernel at its launch.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from mcpo_kernels.linear_logprob.triton.dlogits import row_length
from mcpo_kernels.linear_logprob.triton.logits import block_pair, starts
from mcpo_kernels.linear_logprob.triton.selection import steps_of

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.linear_logprob.triton.slab import Slab


# The arguments of a kernel are flat.
@triton.jit(do_not_specialize=["num_tokens"])
def dhidden_kernel(  # noqa: PLR0913
    dz_ptr,
    weight_ptr,
    count_ptr,
    sum_ptr,
    step_ptr,
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
    length = row_length(num_columns)
    num_steps = tl.cdiv(num_columns, BLOCK_V)
    if step_ptr is not None:
        step_ptr += starts(row_block, 1 + num_steps)
        num_steps = tl.load(step_ptr)
    for step in range(num_steps):
        begin = step * BLOCK_V
        if step_ptr is not None:
            begin = tl.load(step_ptr + 1 + step) * BLOCK_V
        mask_v = offs_v < num_columns - begin
        # By the length of a row, whose end is aligned and holds zeros, as num_columns need not be.
        mask_dz = mask_n[:, None] & (offs_v < length - begin)[None, :]
        dz = tl.load(dz_ptrs + begin, mask=mask_dz, other=0.0)
        weight = tl.load(
            weight_ptrs + starts(begin, num_hidden),
            mask=mask_v[:, None] & mask_d[None, :],
            other=0.0,
        )
        total = tl.dot(dz, weight, total, input_precision=PRECISION)
    tl.store(sum_ptrs, total, mask=mask)


# The arguments of a kernel are flat.
@triton.jit(do_not_specialize=["num_tokens"])
def dweight_kernel(  # noqa: PLR0913
    dz_ptr,
    hidden_ptr,
    count_ptr,
    dweight_ptr,
    step_ptr,
    num_tokens,
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
    num_steps = tl.cdiv(count, BLOCK_N)
    if step_ptr is not None:
        step_ptr += starts(column_block, 1 + tl.cdiv(num_tokens, BLOCK_N))
        num_steps = tl.load(step_ptr)
    for step in range(num_steps):
        begin = step * BLOCK_N
        if step_ptr is not None:
            begin = tl.load(step_ptr + 1 + step) * BLOCK_N
        mask_n = offs_n < count - begin
        # By the length of a row, as in dhidden.
        mask_dz = mask_n[:, None] & (offs_v < length)[None, :]
        dz = tl.load(dz_ptrs + starts(begin, length), mask=mask_dz, other=0.0)
        hidden = tl.load(
            hidden_ptrs + starts(begin, num_hidden),
            mask=mask_n[:, None] & mask_d[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(dz), hidden, total, input_precision=PRECISION)
    dweight_ptrs = dweight_ptr + starts(offs_v, num_hidden)[:, None] + offs_d[None, :]
    mask = mask_v[:, None] & mask_d[None, :]
    tl.store(dweight_ptrs, total.to(dweight_ptr.dtype.element_ty), mask=mask)


def add_to_dhidden(slab: Slab, dz: Tensor, sum_ND: Tensor) -> None:
    """sum [N, D] += dz weight; the first slab of the vocabulary overwrites."""
    tile, sizes = slab.launch.tile("dhidden"), slab.sizes
    blocks_n = triton.cdiv(sizes["num_tokens"], tile.block_n)
    step = None
    if slab.needed is not None:
        step = steps_of(slab.needed.tiles(tile.block_n, tile.block_v, slab.columns))
    dhidden_kernel[(blocks_n * triton.cdiv(sizes["num_hidden"], tile.block_d),)](
        dz_ptr=dz,
        weight_ptr=slab.head.weight_VD[slab.columns],
        count_ptr=slab.rows.count_1,
        sum_ptr=sum_ND,
        step_ptr=step,
        first_column=slab.columns.start,
        **sizes,
        **slab.launch.options("dhidden"),
    )


def write_dweight(slab: Slab, dz: Tensor, dweight_WD: Tensor) -> None:
    """dweight [W, D] = dz^T hidden."""
    tile, sizes = slab.launch.tile("dweight"), slab.sizes
    blocks_v = triton.cdiv(sizes["num_columns"], tile.block_v)
    step = None
    if slab.needed is not None:
        step = steps_of(slab.needed.tiles(tile.block_n, tile.block_v, slab.columns).T)
    dweight_kernel[(blocks_v * triton.cdiv(sizes["num_hidden"], tile.block_d),)](
        dz_ptr=dz,
        hidden_ptr=slab.rows.hidden_ND,
        count_ptr=slab.rows.count_1,
        dweight_ptr=dweight_WD,
        step_ptr=step,
        **sizes,
        **slab.launch.options("dweight"),
    )
