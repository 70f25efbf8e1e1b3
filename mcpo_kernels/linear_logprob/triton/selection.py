"""The gradient filter: which panels of the vocabulary a row cannot do without, and which tiles.

A row may leave out its panels of least softmax mass, as many as together hold at most

    spared = filter_mass (1 - p),      1 - p = -expm1(logp),

but not the panel of its target (docs/numerics.md). With mass_q = exp(panel_lse_q - lse), that is
all panels whose mass is below the largest threshold t for which

    sum of the masses below t <= spared.

The sum never decreases in t, and floats that are not negative are ordered as their bits are: 31
bisections find t exactly, without a sort. One program per row holds all its masses, Q numbers.

The products work on tiles, so a tile is left out where each of its rows may leave out each of its
panels: a subset of what the rule allows, for which the same bounds hold.
"""
# N rows, the M with gradient in front, Q panels

# Triton types the arguments of a kernel at its launch.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from mcpo_kernels.linear_logprob.head import PANEL
from mcpo_kernels.linear_logprob.triton.launch import OPTIONS
from mcpo_kernels.linear_logprob.triton.logits import starts

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.linear_logprob.head import Scores
    from mcpo_kernels.linear_logprob.triton.rows import Rows

INFINITY_BITS = tl.constexpr(0x7F800000)


class Needed(NamedTuple):
    """What the filter keeps."""

    panel_NQ: Tensor
    """bool: the rows with gradient in front, False behind them."""

    def tiles(self, rows: int, columns: int, slab: slice) -> Tensor:
        """bool [row blocks, column blocks] of a slab: whether any row needs any of its panels."""
        panel_NP = self.panel_NQ[:, slab.start // PANEL : -(-slab.stop // PANEL)]
        if columns < PANEL:
            panel_NP = panel_NP.repeat_interleave(PANEL // columns, 1)
        else:
            panel_NP = _any_in_blocks(panel_NP, columns // PANEL)
        blocks = -(-(slab.stop - slab.start) // columns)
        return _any_in_blocks(panel_NP.T, rows).T[:, :blocks].contiguous()


def _any_in_blocks(flag_NQ: Tensor, size: int) -> Tensor:
    num_rows, num_panels = flag_NQ.shape
    missing = -num_panels % size
    padded_NQ = torch.nn.functional.pad(flag_NQ, (0, missing))
    return padded_NQ.reshape(num_rows, -1, size).any(2)


def steps_of(tile_BT: Tensor) -> Tensor:
    """int32 [B, 1 + T]: of each block how many steps it has, then which, ascending."""
    count_B1 = tile_BT.sum(1, keepdim=True)
    step_BT = tile_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return torch.cat((count_B1, step_BT), 1).to(torch.int32)


# The arguments of a kernel are flat.
@triton.jit
def select_kernel(  # noqa: PLR0913
    panel_lse_ptr,
    row_ptr,
    target_ptr,
    number_ptr,
    spared_ptr,
    count_ptr,
    needed_ptr,
    num_panels,
    PANEL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """needed[m, q] = 1 for the panels that row m cannot do without."""
    row = tl.program_id(0)
    if row >= tl.load(count_ptr):
        return
    offs_q = tl.arange(0, BLOCK_Q)
    mask_q = offs_q < num_panels
    panel_lse_ptrs = panel_lse_ptr + starts(tl.load(row_ptr + row), num_panels) + offs_q
    panel_lse = tl.load(panel_lse_ptrs, mask=mask_q, other=-float("inf"))
    mass = tl.exp(panel_lse - tl.load(number_ptr + starts(row, 3)))
    spared = tl.load(spared_ptr + row)
    # Of a row with a mass that is no number nothing is left out, as of one that spares nothing.
    lost = tl.sum(tl.where(mass < float("inf"), 0, 1), 0)
    spared = tl.where(lost > 0, -1.0, spared)

    least = tl.zeros((1,), dtype=tl.int32)
    most = tl.full((1,), INFINITY_BITS, dtype=tl.int32)
    for _ in range(31):
        middle = least + (most - least + 1) // 2
        threshold = tl.cast(middle, tl.float32, bitcast=True)
        below = tl.sum(tl.where(mass < threshold, mass.to(tl.float64), 0.0), 0)
        fits = below <= spared
        least = tl.where(fits, middle, least)
        most = tl.where(fits, most, middle - 1)
    threshold = tl.cast(least, tl.float32, bitcast=True)

    is_target = offs_q == tl.load(target_ptr + row).to(tl.int32) // PANEL
    needed = tl.where(mass < threshold, 0, 1) | tl.where(is_target, 1, 0)
    tl.store(needed_ptr + starts(row, num_panels) + offs_q, needed.to(tl.int8), mask=mask_q)


def select(rows: Rows, scores: Scores, filter_mass: float) -> Needed:
    """The panels of every row with gradient; rows behind them need none."""
    num_tokens, num_panels = scores.panel_lse_NQ.shape
    grad_N = rows.number_N3[:, 1]
    spared_N = filter_mass * -scores.logp_N[rows.row_N].double().expm1()
    # A row whose upstream gradient is no number leaves nothing out: it reaches all it should.
    spared_N = spared_N.masked_fill(~grad_N.isfinite(), -1.0)
    needed_NQ = scores.logp_N.new_zeros((num_tokens, num_panels), dtype=torch.int8)
    select_kernel[(num_tokens,)](
        panel_lse_ptr=scores.panel_lse_NQ,
        row_ptr=rows.row_N,
        target_ptr=rows.target_N,
        number_ptr=rows.number_N3,
        spared_ptr=spared_N,
        count_ptr=rows.count_1,
        needed_ptr=needed_NQ,
        num_panels=num_panels,
        PANEL=PANEL,
        BLOCK_Q=triton.next_power_of_2(num_panels),
        **OPTIONS,
    )
    return Needed(needed_NQ.bool())
