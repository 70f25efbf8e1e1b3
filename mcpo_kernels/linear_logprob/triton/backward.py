"""Backward: gradients of hidden, weight and bias, slab by slab of the vocabulary: three products.

The rows with gradient, M of N, are put side by side (``rows.py``). Then for each slab

    1. dz [M, slab] is computed from the saved lse (``dlogits.py``);
    2. dhidden [M, D] += dz weight, and the slab of dweight = dz^T hidden (``products.py``).

With the forward these are four products in all. A gradient nobody needs is not computed.

Memory beyond the results: dz, of ``SCRATCH_MIB`` or ``SLAB_MULTIPLE`` columns, the larger; the
rows once more [N, D]; dhidden in float32 [N, D]. With a bias, float32 sums of dz per block of
rows.

Numerics: docs/numerics.md. The same call gives the same bits; no atomics. Nothing waits for the
device.
"""
# N scored tokens, M of them with gradient, D hidden, V vocabulary, B blocks of rows

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from mcpo_kernels.linear_logprob.head import Gradients, Head, Needs, Saved
from mcpo_kernels.linear_logprob.triton import tiles
from mcpo_kernels.linear_logprob.triton.dlogits import dlogits_kernel
from mcpo_kernels.linear_logprob.triton.launch import Launch, on_device
from mcpo_kernels.linear_logprob.triton.products import dhidden_kernel, dweight_kernel
from mcpo_kernels.linear_logprob.triton.rows import Rows, rows_with_gradient, scatter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

MIB = 2**20


def backward(grad_N: Tensor, saved: Saved, head: Head, needs: Needs) -> Gradients:
    """Gradients from those of logp; rows where ``grad_N`` is zero are not even read."""
    hidden_ND, weight_VD = saved.hidden_ND, head.weight_VD.contiguous()
    head = head._replace(weight_VD=weight_VD)
    # new_, not _like: contiguous whatever the arguments are, as the schema's fake says.
    dweight_VD = weight_VD.new_empty(weight_VD.shape) if needs.weight else None
    with_bias = needs.bias and head.bias_V is not None
    dbias_V = weight_VD.new_empty(weight_VD.shape[0]) if with_bias else None
    if hidden_ND.shape[0] == 0:
        dhidden_ND = hidden_ND.new_empty(hidden_ND.shape) if needs.hidden else None
        zeros = (None if g is None else g.zero_() for g in (dweight_VD, dbias_V))
        return Gradients(dhidden_ND, *zeros)
    with on_device(hidden_ND):
        rows = rows_with_gradient(grad_N, saved)
        sum_ND = torch.empty_like(rows.hidden_ND, dtype=torch.float32) if needs.hidden else None
        launch = Launch.of(hidden_ND)
        for columns in slabs(hidden_ND.shape[0], weight_VD.shape[0], hidden_ND.dtype):
            part = Gradients(sum_ND, dweight_VD, dbias_V)
            slab_backward(rows, head, columns, part, launch)
        dhidden_ND = None if sum_ND is None else scatter(sum_ND, rows, hidden_ND.dtype)
    return Gradients(dhidden_ND, dweight_VD, dbias_V)


def slab_backward(rows: Rows, head: Head, columns: slice, part: Gradients, launch: Launch) -> None:
    """One slab of the vocabulary: added to ``part.hidden_ND``, written to the two others."""
    num_tokens, num_hidden = rows.hidden_ND.shape
    sizes = {"num_columns": columns.stop - columns.start, "num_hidden": num_hidden}
    weight_WD = head.weight_VD[columns]
    dz, dbias_BW = launch_dlogits(rows, head, columns, launch, part.bias_V is not None)
    if part.bias_V is not None and dbias_BW is not None:
        part.bias_V[columns] = dbias_BW.sum(0)
    if part.hidden_ND is not None:
        tile = launch.tile("dhidden")
        blocks = triton.cdiv(num_tokens, tile.block_n) * triton.cdiv(num_hidden, tile.block_d)
        dhidden_kernel[(blocks,)](
            dz_ptr=dz,
            weight_ptr=weight_WD,
            count_ptr=rows.count_1,
            sum_ptr=part.hidden_ND,
            num_tokens=num_tokens,
            first_column=columns.start,
            **sizes,
            **launch.options("dhidden"),
        )
    if part.weight_VD is not None:
        tile = launch.tile("dweight")
        blocks = triton.cdiv(sizes["num_columns"], tile.block_v)
        dweight_kernel[(blocks * triton.cdiv(num_hidden, tile.block_d),)](
            dz_ptr=dz,
            hidden_ptr=rows.hidden_ND,
            count_ptr=rows.count_1,
            dweight_ptr=part.weight_VD[columns],
            **sizes,
            **launch.options("dweight"),
        )


def launch_dlogits(
    rows: Rows, head: Head, columns: slice, launch: Launch, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """dz of a slab, and the sums of its columns by block of rows if asked for."""
    num_tokens, num_hidden = rows.hidden_ND.shape
    num_columns, tile = columns.stop - columns.start, launch.tile("dlogits")
    blocks_n, blocks_v = (
        triton.cdiv(num_tokens, tile.block_n),
        triton.cdiv(num_columns, tile.block_v),
    )
    dz = rows.hidden_ND.new_empty(num_tokens * triton.cdiv(num_columns, 16) * 16)
    dbias_BW = None
    if with_bias:
        dbias_BW = rows.number_3N.new_empty((blocks_n, num_columns))
    dlogits_kernel[(blocks_n * blocks_v,)](
        hidden_ptr=rows.hidden_ND,
        weight_ptr=head.weight_VD[columns],
        bias_ptr=None if head.bias_V is None else head.bias_V[columns].contiguous(),
        target_ptr=rows.target_N,
        number_ptr=rows.number_3N,
        count_ptr=rows.count_1,
        dz_ptr=dz,
        dbias_ptr=dbias_BW,
        num_tokens=num_tokens,
        num_columns=num_columns,
        num_hidden=num_hidden,
        first_column=columns.start,
        softcap=head.softcap,
        scale=head.scale,
        **launch.options("dlogits"),
    )
    return dz, dbias_BW


def slabs(num_tokens: int, num_vocab: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the vocabulary whose dz keeps to ``SCRATCH_MIB``."""
    room = tiles.SCRATCH_MIB * MIB // (num_tokens * dtype.itemsize)
    width = max(room // tiles.SLAB_MULTIPLE, 1) * tiles.SLAB_MULTIPLE
    starts = range(0, num_vocab, width)
    return (slice(start, min(start + width, num_vocab)) for start in starts)
