"""What the kernels share: addresses, the order of programs, one tile of logits, and tanh.

A tile of logits is z = softcap(scale * (hidden weight^T + bias)), [BLOCK_N, BLOCK_V] in float32,
straight from the accumulator. Forward and backward get it from the same function.
"""
# N rows, D hidden, V vocabulary
# Triton types the arguments of a kernel at its launch.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

# tanh(x) = x + x^3 P(x^2) below SMALL, P by least squares in Chebyshev points; its error is below
# one unit in the last place. 1 - 2 / (exp(2 x) + 1) would lose there what x is smaller than 1 by.
SMALL = tl.constexpr(0.625)
P0 = tl.constexpr(-0.33333329)
P1 = tl.constexpr(0.13332782)
P2 = tl.constexpr(-0.0538525)
P3 = tl.constexpr(0.02100364)
P4 = tl.constexpr(-0.00610495)


@triton.jit
def starts(index, length):
    """Offset of the first element of rows that are ``length`` long, in 64 bits.

    Rows times vocabulary and vocabulary times hidden exceed 2^31, so no kernel multiplies an index
    by a length in another way.
    """
    return tl.cast(index, tl.int64) * length


@triton.jit
def block_pair(program, num_first, num_second, GROUP: tl.constexpr):
    """Which block of the first and second axis a program has, in groups that share an L2 cache.

    GROUP blocks of the first axis go together through all blocks of the second, the first axis
    fastest: what they read of the second is read from memory once for the group.
    """
    group = program // (GROUP * num_second)
    begin = group * GROUP
    size = tl.minimum(num_first - begin, GROUP)
    within = program - group * GROUP * num_second
    return begin + within % size, within // size


@triton.jit
def tanh(x):
    """Tanh within two units in the last place, from exp alone, which every target has."""
    size = tl.abs(x)
    square = x * x
    small = (((P4 * square + P3) * square + P2) * square + P1) * square + P0
    small = size + size * square * small
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    # A NaN is not below SMALL and comes through the other side.
    result = tl.where(size < SMALL, small, large)
    return tl.where(x < 0, -result, result)


# The arguments of a kernel are flat.
@triton.jit
def logits_tile(  # noqa: PLR0913
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    offs_n,
    offs_v,
    mask_n,
    mask_v,
    num_hidden,
    softcap,
    scale,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tile of rows ``offs_n`` and columns ``offs_v``; only what the masks allow is read."""
    offs_d = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + starts(offs_n, num_hidden)[:, None] + offs_d[None, :]
    weight_ptrs = weight_ptr + starts(offs_v, num_hidden)[None, :] + offs_d[:, None]
    logits = tl.zeros((offs_n.shape[0], offs_v.shape[0]), dtype=tl.float32)
    for begin in range(0, num_hidden, BLOCK_D):
        mask_d = offs_d < num_hidden - begin
        hidden = tl.load(hidden_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=mask_d[:, None] & mask_v[None, :], other=0.0)
        logits = tl.dot(hidden, weight, logits, input_precision=PRECISION)
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)
        logits += bias.to(tl.float32)[None, :]
    logits *= scale
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    return logits
