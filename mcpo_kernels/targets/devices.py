"""The GPUs kernels are compiled for: limits of a block, and how many blocks share a processor.

The numbers of CUDA devices are those of the table "Technical Specifications per Compute Capability"
in the CUDA C++ Programming Guide; those of gfx942 of the reference guide of the CDNA 3 instruction
set. A processor is a streaming multiprocessor or a compute unit, a warp may be a wavefront.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """An architecture and what one of its processors has."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    """Bytes of shared memory that a block may have."""
    shared_bytes: int
    """Of a processor."""
    shared_reserved: int
    """Bytes that the system takes from a processor for each block."""
    registers: int
    """Of 32 bits, of one of the four parts of a processor, over all lanes."""
    register_unit: int
    """What a warp takes registers by."""
    max_warps: int
    """Of a processor."""
    max_blocks: int
    tensor_columns: int | None = None
    """Of tensor memory, in a processor that has it."""


def _cuda(arch: int, shared_kib: int, max_warps: int, max_blocks: int, **more: int) -> Target:
    return Target(
        name=f"sm_{arch}",
        backend="cuda",
        arch=arch,
        warp_size=32,
        shared_limit=(shared_kib - 1) * KIB,
        shared_bytes=shared_kib * KIB,
        shared_reserved=KIB,
        registers=16 * KIB,
        register_unit=256,
        max_warps=max_warps,
        max_blocks=max_blocks,
        **more,
    )


TARGETS = {
    target.name: target
    for target in (
        _cuda(80, 164, 64, 32),
        _cuda(89, 100, 48, 24),
        _cuda(90, 228, 64, 32),
        _cuda(100, 228, 64, 32, tensor_columns=512),
        Target(
            name="gfx942",
            backend="hip",
            arch="gfx942",
            warp_size=64,
            shared_limit=64 * KIB,
            shared_bytes=64 * KIB,
            shared_reserved=0,
            registers=512 * 64,
            register_unit=8 * 64,
            max_warps=32,
            max_blocks=32,
        ),
    )
}
"""By name."""


def blocks_per_processor(
    target: Target, *, registers: int, shared: int, warps: int, columns: int = 0
) -> int:
    """How many blocks of a kernel a processor holds at once; 0 if not even one fits.

    Args:
        target: whose processor.
        registers: of a thread.
        shared: bytes of a block.
        warps: of a block.
        columns: of tensor memory, of a block.
    """
    if shared > target.shared_limit:
        return 0
    unit = target.register_unit
    per_warp = -(-max(registers, 1) * target.warp_size // unit) * unit
    by_registers = 4 * (target.registers // per_warp) // warps
    by_shared = target.shared_bytes // max(shared + target.shared_reserved, 1)
    limits = [by_registers, by_shared, target.max_warps // warps, target.max_blocks]
    if columns:
        limits.append((target.tensor_columns or 0) // columns)
    return min(limits)
