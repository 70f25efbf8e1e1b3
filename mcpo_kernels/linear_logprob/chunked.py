"""Portable torch: one tile of logits at a time, one sweep over the vocabulary each way.

Forward keeps per row the running maximum m, the running sum s of exp(z - m) and the target's
logit, so that logp = (z_target - m) - log s. Backward recomputes each tile and turns it in place
into dz = g (onehot - exp(z - lse)); there is no second reduction. The vocabulary is the outer
loop, so a slab of dweight is accumulated over all rows and written once: there is no [V, D]
scratch.

Memory beyond the results: one tile of logits (two in a backward with softcap), one slab of the
weight and one of its gradient, and the rows and their gradient in the accumulation dtype.

A row has the same bits whatever its neighbours: V alone decides how the vocabulary is cut, and
zeros pad what a GEMM is given to sizes at which MKL accumulates every row alike (the tests check
it). cuBLAS may choose another algorithm for another number of rows and promises no such thing.
"""
# N scored tokens, M of them with gradient, R rows of a tile, W its width, D hidden, V vocabulary

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from mcpo_kernels.linear_logprob.head import (
    Allowance,
    Gradients,
    Head,
    Needs,
    Partial,
    Saved,
    Scores,
    accumulation_dtype,
    empty_kept,
    finish,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# Rows and inner size of a GEMM: MKL treats rows at the edge and unaligned rows in another way.
MULTIPLE = 16
# Columns of a GEMM: with fewer, two threads may share the inner sum of few rows.
MIN_COLUMNS = 64
MIB = 2**20


class TileShape(NamedTuple):
    """How the [N, V] logits are cut."""

    width: int
    """Columns at most."""
    budget_mib: int
    """Memory of one tile."""


# Measured on Zen 4: tiles that stay in the cache take 0.7 to 0.9 of the time of 64 MiB ones.
CPU_TILE = TileShape(width=2048, budget_mib=4)
# Few launches, GEMMs that fill the device. Reasoned, not measured.
DEVICE_TILE = TileShape(width=16384, budget_mib=256)


class Kept(NamedTuple):
    """The rows with gradient."""

    grad_M: Tensor
    hidden_MD: Tensor
    target_M: Tensor
    logp_M: Tensor
    lse_M: Tensor


class SlabGradient(NamedTuple):
    """Where the gradients of one slab of the head go, None where not needed."""

    weight_WD: Tensor | None
    bias_W: Tensor | None


def forward(hidden_ND: Tensor, target_N: Tensor, head: Head, allowance: Allowance) -> Scores:
    """Log-probabilities; nothing of the allowance is used."""
    partial_scores = partial(hidden_ND, target_N, head, allowance)
    logp_N, lse_N = finish(*partial_scores[:3])
    return Scores(logp_N, lse_N, *partial_scores[3:])


def partial(hidden_ND: Tensor, target_N: Tensor, head: Head, allowance: Allowance) -> Partial:
    """What the columns of ``head`` say of each row; nothing of the allowance is used."""
    num_tokens, device = hidden_ND.shape[0], hidden_ND.device
    dtype = accumulation_dtype(hidden_ND.dtype)
    max_N = torch.full((num_tokens,), -torch.inf, dtype=dtype, device=device)
    sum_N = torch.zeros_like(max_N)
    target_logit_N = torch.zeros_like(max_N)
    with torch.autocast(device.type, enabled=False):
        padded_ND = pad_rows(hidden_ND)
        for columns in vocabulary_slabs(head.weight_VD):
            slab_WD = pad_slab(head.weight_VD[columns])
            for rows in row_tiles(num_tokens, dtype, device):
                tile_RW = logits_tile(padded_ND, rows, slab_WD, columns, head)
                place_R1, inside_R = place_of_target(target_N[rows], columns)
                found_R = tile_RW.gather(1, place_R1).squeeze(1)
                target_logit_N[rows] = torch.where(inside_R, found_R, target_logit_N[rows])
                max_N[rows], sum_N[rows] = fold_tile(tile_RW, max_N[rows], sum_N[rows])
    return Partial(max_N, sum_N, target_logit_N, *empty_kept(hidden_ND))


def kept_panels(
    num_tokens: int, num_vocab: int, dtype: torch.dtype, allowance: Allowance
) -> tuple[int, int]:
    """None of either kind: see ``cpu.kept_panels``."""
    return 0, 0


def backward(
    grad_N: Tensor, saved: Saved, head: Head, filter_mass: float, needs: Needs
) -> Gradients:
    """Gradients from those of logp; rows where ``grad_N`` is zero are left out of every GEMM."""
    # Counting the rows waits for a CUDA device once.
    kept_M = grad_N.nonzero().squeeze(1)
    logp_N, lse_N, *_ = saved.scores
    kept = Kept(
        grad_N[kept_M],
        saved.hidden_ND[kept_M],
        saved.target_N[kept_M],
        logp_N[kept_M],
        lse_N[kept_M],
    )
    # new_, not _like: contiguous whatever the arguments are, as the schema's fake says.
    dweight_VD = head.weight_VD.new_empty(head.weight_VD.shape) if needs.weight else None
    dbias_V = torch.empty_like(head.bias_V) if needs.bias and head.bias_V is not None else None
    with torch.autocast(grad_N.device.type, enabled=False):
        padded_MD = pad_rows(kept.hidden_MD)
        dhidden_MD = torch.zeros_like(padded_MD, dtype=grad_N.dtype) if needs.hidden else None
        for columns in vocabulary_slabs(head.weight_VD):
            gradient = SlabGradient(
                None if dweight_VD is None else dweight_VD[columns],
                None if dbias_V is None else dbias_V[columns],
            )
            slab_backward(kept, padded_MD, head, columns, dhidden_MD, gradient)
    if dhidden_MD is None:
        return Gradients(None, dweight_VD, dbias_V)
    dhidden_ND = saved.hidden_ND.new_zeros(saved.hidden_ND.shape)
    num_kept, num_hidden = kept.hidden_MD.shape
    dhidden_ND[kept_M] = dhidden_MD[:num_kept, :num_hidden].to(dhidden_ND.dtype)
    return Gradients(dhidden_ND, dweight_VD, dbias_V)


def slab_backward(
    kept: Kept,
    padded_MD: Tensor,
    head: Head,
    columns: slice,
    dhidden_MD: Tensor | None,
    gradient: SlabGradient,
) -> None:
    """One slab of the vocabulary: added to ``dhidden_MD``, written to ``gradient``."""
    slab_WD, width = pad_slab(head.weight_VD[columns]), columns.stop - columns.start
    num_kept, dtype = kept.grad_M.shape[0], kept.grad_M.dtype
    dslab_WD = torch.zeros_like(slab_WD[:width], dtype=dtype)
    dbias_W = dslab_WD.new_zeros(width)
    for rows in row_tiles(num_kept, dtype, slab_WD.device):
        tile_RW = logits_tile(padded_MD, rows, slab_WD, columns, head)
        tile_RW = dlogits_tile(tile_RW, kept, rows, columns, head)
        if gradient.bias_W is not None:
            dbias_W += tile_RW.sum(0)
        operand_RW = tile_RW.to(slab_WD.dtype)
        if dhidden_MD is not None:
            dhidden_MD[rows] += matmul(operand_RW, slab_WD[:width])
        if gradient.weight_WD is not None:
            dslab_WD += matmul(operand_RW.T, padded_MD[rows])
    if gradient.weight_WD is not None:
        gradient.weight_WD.copy_(dslab_WD[:, : head.weight_VD.shape[1]])
    if gradient.bias_W is not None:
        gradient.bias_W.copy_(dbias_W)


def fold_tile(tile_RW: Tensor, max_R: Tensor, sum_R: Tensor) -> tuple[Tensor, Tensor]:
    """The running maximum and sum with one more tile, which is overwritten."""
    new_max_R = torch.maximum(max_R, tile_RW.amax(1))
    # A row that has only met -inf so far has nothing finite to shift by; its sum stays 0.
    shift_R = new_max_R.masked_fill(new_max_R == -torch.inf, 0.0)
    new_sum_R = tile_RW.sub_(shift_R[:, None]).exp_().sum(1)
    return new_max_R, new_sum_R + sum_R * (max_R - shift_R).exp()


def dlogits_tile(tile_RW: Tensor, kept: Kept, rows: slice, columns: slice, head: Head) -> Tensor:
    """Gradient of hidden @ weight.T + bias, written over the tile of logits."""
    grad_R = kept.grad_M[rows]
    place_R1, inside_R = place_of_target(kept.target_M[rows], columns)
    # d softcap(u) / du = 1 - tanh(u / c)^2
    slope_RW = None if head.softcap is None else 1.0 - (tile_RW / head.softcap).square_()
    tile_RW.sub_(kept.lse_M[rows][:, None]).exp_().mul_(-grad_R[:, None])
    # 1 - p from log p: exact where p is so near 1 that the difference would round to 0.
    target_R = -grad_R * kept.logp_M[rows].expm1()
    target_R = torch.where(inside_R, target_R, tile_RW.gather(1, place_R1).squeeze(1))
    tile_RW.scatter_(1, place_R1, target_R[:, None])
    if slope_RW is not None:
        tile_RW.mul_(slope_RW)
    return tile_RW if head.scale == 1.0 else tile_RW.mul_(head.scale)


def logits_tile(
    padded_ND: Tensor, rows: slice, slab_WD: Tensor, columns: slice, head: Head
) -> Tensor:
    """[R, W] logits in the accumulation dtype."""
    padded_RD = padded_ND[rows.start : round_up(rows.stop)]
    tile_RW = matmul(padded_RD, slab_WD.T)
    tile_RW = tile_RW[: rows.stop - rows.start, : columns.stop - columns.start]
    if head.bias_V is not None:
        tile_RW.add_(head.bias_V[columns])
    if head.scale != 1.0:
        tile_RW.mul_(head.scale)
    if head.softcap is not None:
        tile_RW.div_(head.softcap).tanh_().mul_(head.softcap)
    return tile_RW


def place_of_target(target_R: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in a slab [R, 1], any if elsewhere; whether it is inside [R]."""
    place_R = target_R - columns.start
    inside_R = (place_R >= 0) & (target_R < columns.stop)
    return place_R.clamp(0, columns.stop - columns.start - 1)[:, None], inside_R


def vocabulary_slabs(weight_VD: Tensor) -> Iterator[slice]:
    """Slices of nearly equal width: a last slab of one column would be summed in another order."""
    num_vocab, width = weight_VD.shape[0], tile_shape(weight_VD.device).width
    num_slabs = -(-num_vocab // width)
    borders = [num_vocab * slab // num_slabs for slab in range(num_slabs + 1)]
    return map(slice, borders[:-1], borders[1:])


def row_tiles(num_tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Slices of as many rows as the budget of a tile allows, a multiple of ``MULTIPLE``."""
    shape = tile_shape(device)
    height = shape.budget_mib * MIB // (shape.width * dtype.itemsize)
    starts = range(0, num_tokens, height)
    return (slice(start, min(start + height, num_tokens)) for start in starts)


def tile_shape(device: torch.device) -> TileShape:
    """By device alone, so that the order of every sum depends on V and not on N."""
    return CPU_TILE if device.type == "cpu" else DEVICE_TILE


def pad_rows(hidden_ND: Tensor) -> Tensor:
    """The rows as the GEMM wants them, with zeros up to ``MULTIPLE`` both ways."""
    num_tokens, num_hidden = hidden_ND.shape
    missing = (0, round_up(num_hidden) - num_hidden, 0, round_up(num_tokens) - num_tokens)
    row_ND = for_gemm(hidden_ND)
    return (functional.pad(row_ND, missing) if any(missing) else row_ND).contiguous()


def pad_slab(weight_WD: Tensor) -> Tensor:
    """The slab as the GEMM wants it; no copy at the sizes models have."""
    width, num_hidden = weight_WD.shape
    missing = (0, round_up(num_hidden) - num_hidden, 0, max(0, MIN_COLUMNS - width))
    slab_WD = for_gemm(weight_WD)
    return functional.pad(slab_WD, missing) if any(missing) else slab_WD


def round_up(size: int) -> int:
    """The next multiple of ``MULTIPLE``."""
    return -(-size // MULTIPLE) * MULTIPLE


def for_gemm(tensor: Tensor) -> Tensor:
    """In the dtype of the GEMM: on the CPU torch.mm rounds its result to that of its inputs."""
    return tensor.to(accumulation_dtype(tensor.dtype)) if tensor.device.type == "cpu" else tensor


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The product as it leaves the accumulator, never rounded to bf16 or fp16."""
    dtype = accumulation_dtype(left.dtype)
    if left.dtype == dtype:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=dtype)
