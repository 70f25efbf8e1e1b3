"""Judges a binary: one row for each kernel, target and configuration, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcpo_kernels.targets.build import Binary
from mcpo_kernels.targets.devices import Target, blocks_per_processor
from mcpo_kernels.targets.kept import build_once

if TYPE_CHECKING:
    from mcpo_kernels.targets.cases import Case

WIDE = 16
"""Bytes of the widest load that all targets have, 128 bits."""
PIPELINED = {True: "yes", False: "no", None: "no loop"}
"""In words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A kernel on a target in one configuration."""

    kernel: str
    target: str
    config: dict[str, Any]
    """Dtype, options of the head, tile, warps, stages."""
    default: bool
    """Whether launches take this configuration unless something else was tuned."""
    registers: int | None = None
    spills: int | None = None
    """Bytes of a thread."""
    stack: int | None = None
    shared_bytes: int | None = None
    shared_limit: int
    blocks: int | None = None
    """That a processor holds at once."""
    occupancy: float | None = None
    """Warps of those blocks over the most that a processor holds."""
    tensor_core_ops: int | None = None
    """Instructions in the code, not how often they run; null for products of float32."""
    tensor_core_kind: str | None = None
    async_copies: int | None = None
    loads: dict[int, int] | None = None
    """Instructions that load from global memory, by bytes of a thread."""
    pipelined: bool | None = None
    """Null where the kernel has no loop of matrix products."""
    ok: bool
    why: tuple[str, ...]
    """What is not ok."""


def tile_of(config: dict[str, Any]) -> str:
    """The tile of a configuration in short: N x V x D, w warps, s stages."""
    sides = "x".join(str(config.get(name, "-")) for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D"))
    return f"{sides} w{config['num_warps']} s{config['num_stages']}"


def wide_of(loads: Mapping[Any, int]) -> str:
    """How many load instructions are wide, of all; from a row, or from one read from JSON."""
    wide = sum(count for size, count in loads.items() if int(size) >= WIDE)
    return f"{wide} of {sum(loads.values())}"


def row_of(case: Case, *, fresh: bool = False) -> Row:
    """Compile a case, or find it compiled if it need not be ``fresh``, and judge it."""
    try:
        binary = build_once(case.launch, case.target, fresh=fresh)
    # Triton raises errors of many kinds, and each is a result here.
    except Exception as error:
        first = str(error).strip().partition("\n")[0][:300]
        return _failed(case, f"does not compile: {type(error).__name__}: {first}")
    return judge(case, binary)


def row_of_the_dead(case: Case, code: int) -> Row:
    """The row of a case whose compiler took its process down."""
    return _failed(case, f"does not compile: the compiler ended with {code}")


def judge(case: Case, binary: Binary) -> Row:
    """The row of a binary."""
    listing, loops, target = binary.listing, binary.loops, case.target
    blocks = blocks_per_processor(
        target,
        registers=listing.registers,
        shared=binary.shared,
        warps=binary.warps,
        columns=binary.tensor_columns,
    )
    on_tensor_cores = sum(listing.products.values())
    # Float32 multiplied as it is: tensor cores of NVIDIA do not offer that.
    precision = case.config.get("precision", "ieee") if case.config["dtype"] == "fp32" else None
    exact = precision == "ieee"
    why = _faults(
        binary,
        target,
        blocks,
        must_use_tensor_cores=bool(loops) and not exact,
        # No instruction turns a tile of 32-bit elements on its way to the tensor cores, so what
        # is read across (in dweight) is loaded element by element.
        must_load_wide=precision in (None, "ieee"),
    )
    return Row(
        kernel=case.launch.kernel,
        target=target.name,
        config=case.config,
        default=case.default,
        registers=listing.registers,
        spills=listing.spills,
        stack=listing.stack,
        shared_bytes=binary.shared,
        shared_limit=target.shared_limit,
        blocks=blocks,
        occupancy=round(blocks * binary.warps / target.max_warps, 3),
        tensor_core_ops=None if exact and not on_tensor_cores else on_tensor_cores,
        tensor_core_kind=" + ".join(listing.products) or None,
        async_copies=listing.async_copies,
        loads=listing.loads,
        pipelined=all(loop.pipelined for loop in loops) if loops else None,
        ok=not why,
        why=tuple(why),
    )


def _failed(case: Case, why: str) -> Row:
    return Row(
        kernel=case.launch.kernel,
        target=case.target.name,
        config=case.config,
        default=case.default,
        shared_limit=case.target.shared_limit,
        ok=False,
        why=(why,),
    )


def _faults(
    binary: Binary,
    target: Target,
    blocks: int,
    *,
    must_use_tensor_cores: bool,
    must_load_wide: bool,
) -> list[str]:
    listing = binary.listing
    why: list[str] = []
    if listing.spills:
        why.append(f"spills {listing.spills} bytes")
    if binary.shared > target.shared_limit:
        why.append(f"shared memory {binary.shared} > {target.shared_limit} bytes")
    elif not blocks:
        why.append("not one block fits a processor")
    if must_use_tensor_cores and not listing.products:
        why.append("no tensor core instruction")
    for loop in binary.loops:
        if not loop.pipelined:
            why.append(f"loads of {', '.join(loop.tiles)} are not pipelined")
        if must_load_wide and (loop.copied_bytes or WIDE) < WIDE:
            why.append(f"tiles are copied by {loop.copied_bytes} bytes")
    if must_load_wide and binary.loops and max(listing.loads, default=0) < WIDE:
        why.append(f"no load of {WIDE} bytes")
    return why
