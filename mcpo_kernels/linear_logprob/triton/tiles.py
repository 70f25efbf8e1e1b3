"""How each kernel is cut, by dtype and device: data for launches, and the space for tuning.

This file imports nothing, so that tools without Triton can read it. Nothing here was measured on a
GPU: the defaults are reasoned from the size of the accumulators (registers), of the buffers
(shared memory) and of what the matrix instructions take.

Every kernel is a matrix product with an inner loop, and knows three axes: rows (N), vocabulary (V)
and hidden (D). One of them is the inner axis, the other two make the tile of sums that a program
holds:

    forward, dlogits   sums [N, V]   inner D
    dhidden            sums [N, D]   inner V
    dweight            sums [V, D]   inner N

A tile is chosen by kernel, dtype and device alone, never by the number of rows: so a row's bits do
not depend on its neighbours.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

KERNELS = ("forward", "dlogits", "dhidden", "dweight")
FAMILIES = ("sm80", "sm89", "sm90", "sm100", "gfx942")
"""A100; consumer Ada and Blackwell, with 100 KiB of shared memory; H100 and H200; B200; MI300."""
INTERPRETER = "interpreter"
OPERANDS = ("16-bit", "fp32")


class Tile(NamedTuple):
    """One way to cut a kernel."""

    block_n: int
    """Rows; a multiple of 16, as all three are."""
    block_v: int
    """Columns of the vocabulary; in forward and dlogits a multiple of 64, the panel."""
    block_d: int
    """Of the hidden size."""
    num_warps: int
    num_stages: int
    """Of the inner loop: loads in flight, each with a buffer in shared memory."""
    group: int
    """Programs side by side along the first axis of the grid, so that they share what they read
    of the second in the L2 cache."""


SHARED_KIB = {"sm80": 163, "sm89": 99, "sm90": 227, "sm100": 227, "gfx942": 64}
"""Shared memory that one program may have."""
REGISTERS = 64
"""32-bit sums per thread at most. A thread may hold 255 registers, but with 128 sums the compiler
spills in most kernels (docs/targets.md)."""
MORE_REGISTERS = {("dweight", "sm90"): 128, ("dweight", "sm100"): 128}
"""Where more are no trouble: its operands stay in shared memory, and there is no epilogue."""
SPILLS = {("dweight", "sm89", Tile(32, 128, 64, 4, 3, 8))}
"""Tiles of 16-bit operands that fit by these numbers and spill all the same, as the sweep found."""
LANES = {"gfx942": 64}
"""Threads of a warp, where not 32."""


def _both(forward: Tile, dhidden: Tile, dweight: Tile) -> dict[str, Tile]:
    # dlogits is the forward's product with another ending.
    return {"forward": forward, "dlogits": forward, "dhidden": dhidden, "dweight": dweight}


# Without tensor cores: small tiles, because every thread holds its part of the operands.
_FP32 = _both(
    Tile(64, 64, 16, 4, 3, 8),
    Tile(64, 16, 64, 4, 3, 8),
    Tile(16, 64, 64, 4, 3, 8),
)

_AMPERE = _both(
    Tile(128, 128, 32, 8, 4, 8),
    Tile(128, 32, 128, 8, 4, 8),
    Tile(32, 128, 128, 8, 4, 8),
)
_HOPPER = _both(
    Tile(128, 128, 64, 8, 3, 8),
    Tile(128, 64, 128, 8, 4, 8),
    Tile(64, 128, 256, 8, 3, 8),
)

DEFAULTS: dict[tuple[str, str], dict[str, Tile]] = {
    ("sm80", "16-bit"): _AMPERE,
    # Shared memory is short by a stage.
    ("sm89", "16-bit"): {name: tile._replace(num_stages=3) for name, tile in _AMPERE.items()},
    ("sm90", "16-bit"): _HOPPER,
    ("sm100", "16-bit"): _HOPPER,
    # A stage more than one would not fit: 64 KiB for everything.
    ("gfx942", "16-bit"): _both(
        Tile(128, 128, 64, 8, 2, 8),
        Tile(128, 64, 128, 8, 2, 8),
        Tile(64, 128, 128, 8, 2, 8),
    ),
    **{(family, "fp32"): _FP32 for family in FAMILIES if family != "gfx942"},
    # There ptxas keeps to 168 registers, and with 4 warps a head or two spill.
    ("sm89", "fp32"): {
        name: tile._replace(num_warps=8) if name in ("forward", "dlogits") else tile
        for name, tile in _FP32.items()
    },
    ("gfx942", "fp32"): {name: tile._replace(num_stages=2) for name, tile in _FP32.items()},
    # Small, so that small inputs have several programs, splits and slabs.
    **{
        (INTERPRETER, operands): _both(
            Tile(16, 128, 64, 1, 1, 2),
            Tile(16, 64, 64, 1, 1, 2),
            Tile(16, 64, 64, 1, 1, 2),
        )
        for operands in OPERANDS
    },
}

MAX_SPLITS = 128
"""Parts the forward cuts the vocabulary into: programs enough for any device on few rows. By V
alone, as tiles are."""
SCRATCH_MIB = 256
"""Of logit gradients in the backward; decides how wide a slab of the vocabulary is."""
SLAB_MULTIPLE = 512
"""Columns a slab is a multiple of, and its least."""


def default_tiles(family: str, operands: str) -> dict[str, Tile]:
    """The tiles of a launch, by kernel, where nothing was tuned."""
    return DEFAULTS[family, operands]


# What is worth trying. Wide tiles read least, and there is no space for wider ones; smaller ones
# leave more programs to few rows. 64 bytes of the inner axis keep copies whole; 128 are what
# Hopper's instructions read from shared memory at once. float32 has one tile: where it is
# multiplied as it is, registers for operands leave no choice.
_SUMS = ((128, 128), (64, 128), (128, 64), (128, 256), (256, 128))
_INNER = {"sm80": 32, "sm89": 32, "sm90": 64, "sm100": 64, "gfx942": 64}
_STAGES = {"sm80": (3, 4), "sm89": (2, 3), "sm90": (3, 4), "sm100": (3, 4), "gfx942": (2,)}


def space(kernel: str, family: str, operands: str) -> Iterator[Tile]:
    """Tiles that tuning may try, the default first. Each passes docs/targets.md."""
    default = default_tiles(family, operands)[kernel]
    yield default
    if family == INTERPRETER or operands == "fp32":
        return
    inner = _INNER[family]
    for (first, second), stages in product(_SUMS, _STAGES[family]):
        block_n, block_v, block_d = {
            "forward": (first, second, inner),
            "dlogits": (first, second, inner),
            "dhidden": (first, inner, second),
            "dweight": (inner, first, second),
        }[kernel]
        for num_warps in (4, 8):
            tile = Tile(block_n, block_v, block_d, num_warps, stages, default.group)
            if fits(tile, kernel, family, operands):
                if tile != default and (kernel, family, tile) not in SPILLS:
                    yield tile
                # More warps than hold the sums would leave each with less to do for its loads.
                break


def fits(tile: Tile, kernel: str, family: str, operands: str) -> bool:
    """Whether sums and buffers fit by the sizes above; the compiler has the last word."""
    first, second, inner = sums_and_inner(tile, kernel)
    item = 4 if operands == "fp32" else 2
    buffers = (first + second) * inner * item * tile.num_stages
    threads = tile.num_warps * LANES.get(family, 32)
    sums = MORE_REGISTERS.get((kernel, family), REGISTERS)
    return first * second <= sums * threads and buffers <= SHARED_KIB[family] * 1024


def sums_and_inner(tile: Tile, kernel: str) -> tuple[int, int, int]:
    """The two sides of the tile of sums and the step of the inner loop."""
    return {
        "forward": (tile.block_n, tile.block_v, tile.block_d),
        "dlogits": (tile.block_n, tile.block_v, tile.block_d),
        "dhidden": (tile.block_n, tile.block_d, tile.block_v),
        "dweight": (tile.block_v, tile.block_d, tile.block_n),
    }[kernel]
