"""What the kernels would take if they did nothing but multiply, or nothing but move bytes.

A prediction: no kernel ran. ``python -m mcpo_kernels.linear_logprob.triton.roofline`` prints the
table of docs/triton.md. The rates are the vendors' peaks for dense bfloat16; a kernel stays below.

Bytes are those between memory and L2 under one assumption: blocks that run side by side share what
they read. So of a product's two operands, that of the first axis of the grid is read once, that of
the second once for each group of ``group`` blocks of the first; results are written once.
"""
# N scored tokens, M of them with gradient, D hidden, V vocabulary

from __future__ import annotations

from typing import NamedTuple

from mcpo_kernels.linear_logprob.triton.tiles import MAX_SPLITS, SCRATCH_MIB, default_tiles

ITEM, SUM = 2, 4
"""Bytes of an operand in bfloat16 and of a float32 sum."""
MIB = 2**20


class Device(NamedTuple):
    """Peak rates, as the vendor states them."""

    name: str
    family: str
    tera_flops: float
    tera_bytes: float


DEVICES = (
    Device("A100", "sm80", 312, 2.04),
    Device("H100", "sm90", 989, 3.35),
    Device("B200", "sm100", 2250, 8.0),
)
SHAPES = ((4096, 576, 49152), (8192, 2048, 128256), (8192, 4096, 128256), (16, 4096, 128256))
"""N, D, V."""


class Work(NamedTuple):
    """What one direction asks of a device."""

    flops: float
    num_bytes: float

    def milliseconds(self, device: Device) -> tuple[float, float]:
        """Of the products and of the bytes; the larger bounds the time."""
        return self.flops / device.tera_flops / 1e9, self.num_bytes / device.tera_bytes / 1e9


def forward(family: str, num_rows: int, num_hidden: int, num_vocab: int) -> Work:
    """One product; partial results of every split."""
    tile = default_tiles(family, "16-bit")["forward"]
    weight = num_vocab * num_hidden * ITEM * _groups(num_rows, tile.block_n, tile.group)
    splits = min(_blocks(num_vocab, tile.block_v), MAX_SPLITS)
    partial = 2 * 3 * splits * num_rows * SUM
    hidden = num_rows * num_hidden * ITEM
    return Work(2.0 * num_rows * num_hidden * num_vocab, weight + hidden + partial)


def backward(family: str, num_tokens: int, num_hidden: int, num_vocab: int, num_rows: int) -> Work:
    """Three products over the M rows with gradient; dz is written once and read twice."""
    flops = 3 * 2.0 * num_rows * num_hidden * num_vocab
    dz, hidden = num_rows * num_vocab * ITEM, num_rows * num_hidden * ITEM
    weight = num_vocab * num_hidden * ITEM
    # The scratch has room for all N rows, so these decide how many slabs there are.
    num_slabs = _blocks(num_tokens * num_vocab * ITEM, SCRATCH_MIB * MIB)
    dlogits, dhidden, dweight = (
        default_tiles(family, "16-bit")[kernel] for kernel in ("dlogits", "dhidden", "dweight")
    )
    num_bytes = (
        # The rows put side by side, read and written.
        2 * hidden
        + weight * _groups(num_rows, dlogits.block_n, dlogits.group)
        + num_slabs * hidden
        + dz
        + dz
        + weight * _groups(num_rows, dhidden.block_n, dhidden.group)
        + num_slabs * 2 * num_rows * num_hidden * SUM
        + dz
        + hidden * _groups(num_vocab, dweight.block_v, dweight.group)
        + weight
        # dhidden from its sum.
        + num_rows * num_hidden * (SUM + ITEM)
    )
    return Work(flops, num_bytes)


def table() -> str:
    """Markdown: milliseconds by device, shape and direction."""
    lines = [
        "| device | N | D | V | direction | products ms | bytes ms | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for device in DEVICES:
        for shape in SHAPES:
            num_tokens, third = shape[0], max(1, shape[0] // 3)
            for direction, work in (
                ("forward", forward(device.family, *shape)),
                ("backward", backward(device.family, *shape, num_tokens)),
                ("backward of a third", backward(device.family, *shape, third)),
            ):
                products, moved = work.milliseconds(device)
                bound = "products" if products >= moved else "bytes"
                cells = (device.name, *shape, direction, f"{products:.2f}", f"{moved:.2f}", bound)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _groups(size: int, block: int, group: int) -> int:
    return _blocks(_blocks(size, block), group)


if __name__ == "__main__":
    print(table())
