"""Backward, step 1: dz[m, v] = g_m (onehot - p) slope scale of one slab of the vocabulary.

p = exp(z - lse) with the lse of the forward, so there is no second reduction; z is computed again.
With a softcap c, slope = 1 - (z / c)^2, else 1. The entry of the target comes from logp:
1 - p = -expm1(logp), exact where p is so near 1 that the difference would round to 0.

Tiling. A program owns a tile of BLOCK_N rows and BLOCK_V columns, its inner loop goes over D.
Programs behind the last row with gradient leave at once; so do those whose tile the filter leaves
out (``selection.py``), and write zeros.

Memory. dz [N, slab] in the dtype of the operands, rows padded with zeros to a multiple of 16
numbers. Each program may add up its columns, before rounding, for dbias: [row blocks, slab] in
float32.
"""
# N rows, D hidden, V vocabulary, W columns of the slab, B blocks of rows
# Triton types the arguments of a kernel at its launch.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mcpo_kernels.linear_logprob.triton.logits import block_pair, logits_tile, starts

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.linear_logprob.triton.slab import Slab


@triton.jit
def row_length(num_columns):
    """Length of a row of dz: a multiple of 16, so that loads are wide whatever the slab."""
    return tl.cdiv(num_columns, 16) * 16


# The arguments of a kernel are flat.
@triton.jit(do_not_specialize=["num_tokens"])
def dlogits_kernel(  # noqa: PLR0913
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    number_ptr,
    count_ptr,
    dz_ptr,
    dbias_ptr,
    keep_ptr,
    num_tokens,
    num_columns,
    num_hidden,
    first_column,
    softcap,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of dz; weight and bias are those of the slab, which begins at first_column."""
    num_column_blocks = tl.cdiv(num_columns, BLOCK_V)
    row_block, column_block = block_pair(
        tl.program_id(0), tl.cdiv(num_tokens, BLOCK_N), num_column_blocks, GROUP
    )
    count = tl.load(count_ptr).to(tl.int32)
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_n, mask_v = offs_n < count, offs_v < num_columns
    dz_ptrs = dz_ptr + starts(offs_n, row_length(num_columns))[:, None] + offs_v[None, :]
    mask = mask_n[:, None] & mask_v[None, :]
    # Rows are written to their full length, so that the products can load them by 16 columns.
    mask_dz = mask_n[:, None] & (offs_v < row_length(num_columns))[None, :]
    idle = row_block * BLOCK_N >= count
    if keep_ptr is not None:
        idle = idle | (tl.load(keep_ptr + row_block * num_column_blocks + column_block) == 0)
    if idle:
        # The products read every row with gradient, whether or not they skip as this does.
        zeros = tl.zeros((BLOCK_N, BLOCK_V), dtype=dz_ptr.dtype.element_ty)
        tl.store(dz_ptrs, zeros, mask=mask_dz)
        if dbias_ptr is not None:
            dbias_ptrs = dbias_ptr + starts(row_block, num_columns) + offs_v
            tl.store(dbias_ptrs, tl.zeros((BLOCK_V,), dtype=tl.float32), mask=mask_v)
        return

    logits = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, mask_n, mask_v,
        num_hidden, softcap, scale, BLOCK_D, PRECISION,
    )  # fmt: skip
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32) - first_column
    lse = tl.load(number_ptr + offs_n, mask=mask_n, other=0.0)
    grad = tl.load(number_ptr + num_tokens + offs_n, mask=mask_n, other=0.0)
    number_ptr += starts(2, num_tokens)
    target_grad = tl.load(number_ptr + offs_n, mask=mask_n, other=0.0)

    dz = -grad[:, None] * tl.exp(logits - lse[:, None])
    is_target = offs_v[None, :] == target[:, None]
    dz = tl.where(is_target, target_grad[:, None], dz)
    if softcap is not None:
        tangent = logits / softcap
        dz *= 1.0 - tangent * tangent
    dz *= scale
    # Outside, exp of anything times 0 need not be 0.
    dz = tl.where(mask, dz, 0.0)
    tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=mask_dz)
    if dbias_ptr is not None:
        dbias_ptrs = dbias_ptr + starts(row_block, num_columns) + offs_v
        tl.store(dbias_ptrs, tl.sum(dz, 0), mask=mask_v)


def dlogits(slab: Slab, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """dz of a slab, flat, and the sums of its columns [W] in float32 if asked for."""
    tile, sizes = slab.launch.tile("dlogits"), slab.sizes
    num_tokens, num_columns = sizes["num_tokens"], sizes["num_columns"]
    blocks = triton.cdiv(num_tokens, tile.block_n)
    rows, head, columns = slab.rows, slab.head, slab.columns
    dz = rows.hidden_ND.new_empty(num_tokens * triton.cdiv(num_columns, 16) * 16)
    dbias_BW = rows.number_3N.new_empty((blocks, num_columns)) if with_bias else None
    keep = None
    if slab.needed is not None:
        keep = slab.needed.tiles(tile.block_n, tile.block_v, columns).to(torch.int8)
    dlogits_kernel[(blocks * triton.cdiv(num_columns, tile.block_v),)](
        hidden_ptr=rows.hidden_ND,
        weight_ptr=head.weight_VD[columns],
        bias_ptr=None if head.bias_V is None else head.bias_V[columns].contiguous(),
        target_ptr=rows.target_N,
        number_ptr=rows.number_3N,
        count_ptr=rows.count_1,
        dz_ptr=dz,
        dbias_ptr=dbias_BW,
        keep_ptr=keep,
        first_column=columns.start,
        softcap=head.softcap,
        scale=head.scale,
        **sizes,
        **slab.launch.options("dlogits"),
    )
    return dz, None if dbias_BW is None else dbias_BW.sum(0)
