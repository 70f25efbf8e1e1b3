"""Backward, step 1: dz[m, v] = g_m (onehot - p) slope scale of one slab of the vocabulary.

p = exp(z - lse) with the lse of the forward, so there is no second reduction; z is computed again.
With a softcap c, slope = 1 - (z / c)^2, else 1. The entry of the target comes from logp:
1 - p = -expm1(logp), exact where p is so near 1 that the difference would round to 0.

Tiling. A program owns a tile of BLOCK_N rows and BLOCK_V columns, its inner loop goes over D.
Programs behind the last row with gradient leave at once; so do those whose tile the filter leaves
out (``selection.py``), and write zeros. What a program does is one number, the height of its tile.

Memory. dz [N, slab] in the dtype of the operands, rows padded with zeros to a multiple of 16
numbers. Each program may add up its columns, before rounding, for dbias: [row blocks, slab] in
float32.
"""
# N rows, D hidden, V vocabulary, W columns of the slab, B blocks of rows, C blocks of columns
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
    from mcpo_kernels.linear_logprob.triton.tiles import Tile


@triton.jit
def row_length(num_columns):
    """Length of a row of dz: a multiple of 16, so that loads are wide whatever the slab."""
    return tl.cdiv(num_columns, 16) * 16


# The arguments of a kernel are flat.
@triton.jit
def dlogits_kernel(  # noqa: PLR0913
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    number_ptr,
    height_ptr,
    dz_ptr,
    dbias_ptr,
    num_columns,
    num_hidden,
    softcap,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of dz; weight, bias and targets are those of the slab."""
    num_column_blocks = tl.cdiv(num_columns, BLOCK_V)
    num_row_blocks = tl.num_programs(0) // num_column_blocks
    row_block, column_block = block_pair(tl.program_id(0), num_row_blocks, num_column_blocks, GROUP)
    height = tl.load(height_ptr + row_block * num_column_blocks + column_block)
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_n = tl.arange(0, BLOCK_N) < tl.abs(height)
    mask_v = offs_v < num_columns
    dz_ptrs = dz_ptr + starts(offs_n, row_length(num_columns))[:, None] + offs_v[None, :]
    mask = mask_n[:, None] & mask_v[None, :]
    # Rows are written to their full length, so that the products can load them by 16 columns.
    mask_dz = mask_n[:, None] & (offs_v < row_length(num_columns))[None, :]
    if height <= 0:
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
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)
    number_ptrs = number_ptr + starts(offs_n, 3)
    lse = tl.load(number_ptrs, mask=mask_n, other=0.0)
    grad = tl.load(number_ptrs + 1, mask=mask_n, other=0.0)
    target_grad = tl.load(number_ptrs + 2, mask=mask_n, other=0.0)

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
    rows, head, columns = slab.rows, slab.head, slab.columns
    height_BC = heights(slab, tile)
    dz = rows.hidden_ND.new_empty(num_tokens * triton.cdiv(num_columns, 16) * 16)
    dbias_BW = None
    if with_bias:
        dbias_BW = rows.number_N3.new_empty((height_BC.shape[0], num_columns))
    dlogits_kernel[(height_BC.numel(),)](
        hidden_ptr=rows.hidden_ND,
        weight_ptr=head.weight_VD[columns],
        bias_ptr=None if head.bias_V is None else head.bias_V[columns].contiguous(),
        target_ptr=rows.target_N - columns.start,
        number_ptr=rows.number_N3,
        height_ptr=height_BC,
        dz_ptr=dz,
        dbias_ptr=dbias_BW,
        num_columns=num_columns,
        num_hidden=sizes["num_hidden"],
        softcap=head.softcap,
        scale=head.scale,
        **slab.launch.options("dlogits"),
    )
    return dz, None if dbias_BW is None else dbias_BW.sum(0)


def heights(slab: Slab, tile: Tile) -> Tensor:
    """int32 [B, C]: how many rows of each tile of dz have a gradient, which stand in front.

    Minus that where a filter leaves the tile out, and 0 behind the last row with gradient.
    """
    rows, sizes = slab.rows, slab.sizes
    first_B = torch.arange(0, sizes["num_tokens"], tile.block_n, device=rows.count_1.device)
    height_B1 = (rows.count_1 - first_B).clamp(0, tile.block_n)[:, None]
    height_BC = height_B1.expand(-1, triton.cdiv(sizes["num_columns"], tile.block_v))
    if slab.needed is not None:
        needed_BC = slab.needed.tiles(tile.block_n, tile.block_v, slab.columns)
        height_BC = torch.where(needed_BC, height_BC, -height_BC)
    return height_BC.to(torch.int32, memory_format=torch.contiguous_format)
