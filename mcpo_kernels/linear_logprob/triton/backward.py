"""Backward: gradients of hidden, weight and bias, slab by slab of the vocabulary: three products.

The rows with gradient, M of N, are put side by side (``rows.py``), and a filter says which tiles
they can do without (``selection.py``). Then for each slab

    1. dz [M, slab] is computed from the saved lse (``dlogits.py``);
    2. dhidden [M, D] += dz weight, and the slab of dweight = dz^T hidden (``products.py``).

With the forward these are four products in all. A gradient nobody needs is not computed.

Memory beyond the results: dz, of ``SCRATCH_MIB`` or ``SLAB_MULTIPLE`` columns, the larger; the
rows once more [N, D]; dhidden in float32 [N, D]. With a bias, float32 sums of dz per block of
rows.

Numerics: docs/numerics.md. The same call gives the same bits; no atomics. Nothing waits for the
device.
"""
# N scored tokens, M of them with gradient, D hidden, V vocabulary, W columns of a slab

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcpo_kernels.linear_logprob.head import Gradients, Head, Needs, Saved
from mcpo_kernels.linear_logprob.triton.dlogits import dlogits
from mcpo_kernels.linear_logprob.triton.launch import Launch, on_device
from mcpo_kernels.linear_logprob.triton.products import add_to_dhidden, write_dweight
from mcpo_kernels.linear_logprob.triton.rows import rows_with_gradient, scatter
from mcpo_kernels.linear_logprob.triton.selection import select
from mcpo_kernels.linear_logprob.triton.slab import Slab, slabs

if TYPE_CHECKING:
    from torch import Tensor


def backward(
    grad_N: Tensor, saved: Saved, head: Head, filter_mass: float, needs: Needs
) -> Gradients:
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
        needed = select(rows, saved.scores, filter_mass) if filter_mass > 0 else None
        launch = Launch.of(hidden_ND)
        for columns in slabs(hidden_ND.shape[0], weight_VD.shape[0], hidden_ND.dtype):
            slab = Slab(rows, needed, head, columns, launch)
            dz, dbias_W = dlogits(slab, with_bias)
            if sum_ND is not None:
                add_to_dhidden(slab, dz, sum_ND)
            if dweight_VD is not None:
                write_dweight(slab, dz, dweight_VD[columns])
            if dbias_V is not None and dbias_W is not None:
                dbias_V[columns] = dbias_W
        dhidden_ND = None if sum_ND is None else scatter(sum_ND, rows, hidden_ND.dtype)
    return Gradients(dhidden_ND, dweight_VD, dbias_V)
