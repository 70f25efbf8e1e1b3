"""Forward: logp[n] = z[n, y_n] - log sum_v exp z[n, v], without stored z: one matrix product.

Tiling. The vocabulary is cut into S splits. A program owns BLOCK_N rows and one split and walks it
in tiles of BLOCK_V columns, whose inner loop goes over D. Per row it keeps the running maximum m,
the running sum s of exp(z - m), and z[n, y_n] if its split holds the target. A second kernel
merges the splits of a row, in ascending order, and ends in

    logp = (z_target - m) - log s,      lse = m + log s.

Memory. Partial results, 3 S N floats; the [N, V] logits never exist. GROUP blocks of rows go
through the splits side by side, so a tile of the weight comes from memory once for all of them.

Numerics. Logits, maxima and sums are float32, the target's logit is that of the same accumulator.
S depends on V and the tile alone and a row is never added to another, so the bits of a row do not
depend on N or on its neighbours. No atomics: the same call gives the same bits.
"""
# N scored tokens, D hidden, V vocabulary, S splits, Q panels
# Triton types the arguments of a kernel at its launch.
# pyright: reportMissingParameterType=false, reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from mcpo_kernels.linear_logprob.head import PANEL, Head, Partial, Scores, empty_kept
from mcpo_kernels.linear_logprob.triton.launch import OPTIONS, Launch, on_device
from mcpo_kernels.linear_logprob.triton.logits import block_pair, logits_tile, starts
from mcpo_kernels.linear_logprob.triton.tiles import MAX_SPLITS

if TYPE_CHECKING:
    from torch import Tensor

MERGE_ROWS = 128


# The arguments of a kernel are flat.
@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(  # noqa: PLR0913
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    partial_ptr,
    panel_lse_ptr,
    num_tokens,
    num_vocab,
    num_hidden,
    num_splits,
    softcap,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PANEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum, sum and target logit of BLOCK_N rows over one split, to partial [3, S, N]."""
    row_block, split = block_pair(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_N), num_splits, GROUP)
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)
    maximum = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    target_logit = tl.zeros((BLOCK_N,), dtype=tl.float32)

    split_width = tl.cdiv(tl.cdiv(num_vocab, BLOCK_V), num_splits) * BLOCK_V
    first_column = split * split_width
    for column in range(first_column, tl.minimum(first_column + split_width, num_vocab), BLOCK_V):
        offs_v = column + tl.arange(0, BLOCK_V)
        mask_v = offs_v < num_vocab
        logits = logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, mask_n, mask_v,
            num_hidden, softcap, scale, BLOCK_D, PRECISION,
        )  # fmt: skip
        is_target = offs_v[None, :] == target[:, None]
        target_logit += tl.sum(tl.where(is_target, logits, 0.0), 1)
        logits = tl.where(mask_v[None, :], logits, -float("inf"))
        higher = tl.maximum(maximum, tl.max(logits, 1))
        # A row that has only met -inf so far has nothing finite to shift by; its sum stays 0.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        exponential = tl.exp(logits - shift[:, None])
        total = total * tl.exp(maximum - shift) + tl.sum(exponential, 1)
        maximum = higher
        if panel_lse_ptr is not None:
            panels = tl.reshape(exponential, (BLOCK_N, BLOCK_V // PANEL, PANEL))
            panel_lse = maximum[:, None] + tl.log(tl.sum(panels, 2))
            num_panels = tl.cdiv(num_vocab, PANEL)
            offs_q = column // PANEL + tl.arange(0, BLOCK_V // PANEL)
            tl.store(
                panel_lse_ptr + starts(offs_n, num_panels)[:, None] + offs_q[None, :],
                panel_lse,
                mask=mask_n[:, None] & (offs_q < num_panels)[None, :],
            )

    partial_ptrs = partial_ptr + starts(split, num_tokens) + offs_n
    plane = starts(num_splits, num_tokens)
    tl.store(partial_ptrs, maximum, mask=mask_n)
    tl.store(partial_ptrs + plane, total, mask=mask_n)
    tl.store(partial_ptrs + 2 * plane, target_logit, mask=mask_n)


@triton.jit(do_not_specialize=["num_tokens"])
def merge_kernel(partial_ptr, logp_ptr, lse_ptr, num_tokens, num_splits, BLOCK_N: tl.constexpr):
    """Logp and lse of BLOCK_N rows from their splits, in ascending order."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    plane = starts(num_splits, num_tokens)
    maximum = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    partial_ptrs = partial_ptr + offs_n
    for _ in range(num_splits):
        found = tl.load(partial_ptrs, mask=mask_n, other=0.0)
        maximum = tl.maximum(maximum, found)
        partial_ptrs += num_tokens
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)

    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    target_logit = tl.zeros((BLOCK_N,), dtype=tl.float32)
    partial_ptrs = partial_ptr + offs_n
    for _ in range(num_splits):
        found = tl.load(partial_ptrs, mask=mask_n, other=0.0)
        total += tl.load(partial_ptrs + plane, mask=mask_n, other=0.0) * tl.exp(found - shift)
        target_logit += tl.load(partial_ptrs + 2 * plane, mask=mask_n, other=0.0)
        partial_ptrs += num_tokens
    log_total = tl.log(total)
    # Not target_logit - lse: the difference of the large terms first loses nothing.
    tl.store(logp_ptr + offs_n, (target_logit - maximum) - log_total, mask=mask_n)
    tl.store(lse_ptr + offs_n, maximum + log_total, mask=mask_n)


class Splits(NamedTuple):
    """What the splits of the vocabulary say of each row."""

    number_3SN: Tensor
    """float32: largest logit, sum of exp(z - largest), target logit where the split holds it."""
    kept: tuple[Tensor, Tensor]
    """The last two of ``Scores``."""


def forward(hidden_ND: Tensor, target_N: Tensor, head: Head, lse_panels: int) -> Scores:
    """Log-probabilities, and the log-sum-exp of ``lse_panels`` panels: all of them, or none."""
    splits = run_splits(hidden_ND, target_N, head, lse_panels)
    num_tokens = hidden_ND.shape[0]
    logp_N, lse_N = (hidden_ND.new_empty(num_tokens, dtype=torch.float32) for _ in range(2))
    if num_tokens > 0:
        with on_device(hidden_ND):
            merge_kernel[(triton.cdiv(num_tokens, MERGE_ROWS),)](
                partial_ptr=splits.number_3SN,
                logp_ptr=logp_N,
                lse_ptr=lse_N,
                num_tokens=num_tokens,
                num_splits=splits.number_3SN.shape[1],
                BLOCK_N=MERGE_ROWS,
                **OPTIONS,
            )
    return Scores(logp_N, lse_N, *splits.kept)


def partial(hidden_ND: Tensor, target_N: Tensor, head: Head, lse_panels: int) -> Partial:
    """What the columns of ``head`` say of each row, for a head of which they are a slab."""
    splits = run_splits(hidden_ND, target_N, head, lse_panels)
    max_SN, sum_SN, target_logit_SN = splits.number_3SN
    max_N = max_SN.amax(0)
    shift_N = max_N.masked_fill(max_N == -torch.inf, 0.0)
    # In float64, where the order in which torch adds up does not show.
    sum_N = (sum_SN * (max_SN - shift_N).exp()).double().sum(0).float()
    # At most one of them is not 0.
    return Partial(max_N, sum_N, target_logit_SN.sum(0), *splits.kept)


def run_splits(hidden_ND: Tensor, target_N: Tensor, head: Head, lse_panels: int) -> Splits:
    """Every split by itself."""
    num_tokens, num_hidden = hidden_ND.shape
    num_vocab = head.weight_VD.shape[0]
    launch = Launch.of(hidden_ND)
    tile = launch.tile("forward")
    num_splits = number_of_splits(num_vocab, tile.block_v)
    number_3SN = hidden_ND.new_empty((3, num_splits, num_tokens), dtype=torch.float32)
    kept = empty_kept(hidden_ND, 0, lse_panels)
    if num_tokens == 0:
        return Splits(number_3SN, kept)
    with on_device(hidden_ND):
        forward_kernel[(triton.cdiv(num_tokens, tile.block_n) * num_splits,)](
            hidden_ptr=hidden_ND.contiguous(),
            weight_ptr=head.weight_VD.contiguous(),
            bias_ptr=None if head.bias_V is None else head.bias_V.contiguous(),
            target_ptr=target_N.contiguous(),
            partial_ptr=number_3SN,
            panel_lse_ptr=kept[1] if lse_panels else None,
            num_tokens=num_tokens,
            num_vocab=num_vocab,
            num_hidden=num_hidden,
            num_splits=num_splits,
            softcap=head.softcap,
            scale=head.scale,
            PANEL=PANEL,
            **launch.options("forward"),
        )
    return Splits(number_3SN, kept)


def number_of_splits(num_vocab: int, block_v: int) -> int:
    """At most ``MAX_SPLITS``, by the vocabulary alone; none of them is empty."""
    tiles = triton.cdiv(num_vocab, block_v)
    return triton.cdiv(tiles, triton.cdiv(tiles, MAX_SPLITS))
