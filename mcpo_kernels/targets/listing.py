"""Reads what a compiler made of a kernel: instructions, registers, loops. Text in, numbers out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# Products on tensor cores, as machines spell them; the kind is what tables show.
MATRIX_PRODUCTS = {
    "mma": re.compile(r"[HIQDB]MMA"),
    "wgmma": re.compile(r"[HIQ]GMMA"),
    "tcgen05": re.compile(r"UTC[A-Z]*MMA"),
    "mfma": re.compile(r"v_s?mfma\w*"),
}
# Copies from global to shared memory that no register holds, and AMD's loads by buffer.
ASYNC_COPIES = re.compile(r"LDGSTS|UTMALDG|UBLKCP|buffer_load_\w+|global_load_lds_\w+")
_SASS_LOADS = ("LDG", "LDGSTS", "UTMALDG")
_AMD_LOADS = re.compile(r"(?:buffer|global|flat)_load_\w+")
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_AMD_LINE = re.compile(r"^\t([a-z][a-z0-9_]+)(?=[ \n])", re.M)
_AMD_BYTES = {"x4": 16, "x3": 12, "x2": 8, "rd": 4, "rt": 2, "te": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """An innermost loop that multiplies matrices."""

    tiles: tuple[str, ...]
    """Shapes and element types of the tiles that it loads from global memory."""
    pipelined: bool
    """Whether each is also loaded before the loop: then a turn uses what an earlier one loaded."""
    copied_bytes: int | None = None
    """The least that a thread copies of a tile to shared memory at once; None if none is copied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What the machine code of a kernel holds, and what it takes."""

    registers: int
    """Of a thread."""
    spills: int
    """Bytes by which a thread's registers overflow into memory."""
    stack: int
    """Bytes of a thread in memory."""
    products: dict[str, int] = field(default_factory=dict)
    """Instructions on tensor cores, by kind."""
    async_copies: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    """Instructions that load from global memory, by bytes of a thread."""


def read_sass(sass: str, log: str) -> Listing:
    """From the disassembly of a CUDA binary and what ptxas said of it.

    Raises:
        ValueError: ptxas said nothing of registers.
    """
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if used is None or spilled is None:
        raise ValueError(f"ptxas must report registers and spills, got {log[:300]!r}")
    stack, *spills = map(int, spilled.groups())
    names = _SASS_LINE.findall(sass)
    return Listing(
        registers=int(used[1]),
        spills=max(spills),
        stack=stack,
        loads=_by_bytes(name for name in names if name.split(".")[0] in _SASS_LOADS),
        **_counts([name.split(".")[0] for name in names]),
    )


def read_amdgcn(assembly: str) -> Listing:
    """From the assembly of an AMD binary, whose metadata count registers."""

    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.M)
        if found is None:
            raise ValueError(f"the assembly must state .{name}")
        return int(found[1])

    names = _AMD_LINE.findall(assembly)
    return Listing(
        registers=number("vgpr_count"),
        spills=4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        stack=number("private_segment_fixed_size"),
        loads=_by_bytes(name for name in names if _AMD_LOADS.fullmatch(name)),
        **_counts(names),
    )


def read_loops(ttgir: str) -> tuple[Loop, ...]:
    """The innermost loops with matrix products, from Triton's representation after pipelining."""
    text = _PLACE.sub("", ttgir)
    root = _Block(loop=False)
    loops: list[_Block] = []
    stack = [root]
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("}"):
            stack.pop()
        if bare.endswith("{"):
            # What a branch holds belongs to the loop around it.
            inner = _Block(loop=True, parent=stack[-1]) if "scf.for" in bare else stack[-1]
            if inner is not stack[-1]:
                inner.before = list(stack[-1].tiles)
                loops.append(inner)
            stack.append(inner)
            continue
        stack[-1].read(bare)
    # A loop around another holds the products that pipelining peeled off that one.
    multiplying = [block for block in loops if block.multiplies]
    around = {id(block.parent) for block in multiplying}
    return tuple(block.as_loop() for block in multiplying if id(block) not in around)


_PLACE = re.compile(r' ?loc\((?:#loc\d*|unknown|"[^"]*"(?:\(#loc\d*\))?)\)')
_DOT = re.compile(r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)(?:_scaled)? ")
_TILE_LOAD = re.compile(
    r"(?:tt\.load|tt\.descriptor_load|async_copy_global_to_local|async_tma_copy_global_to_local"
    r"|\w+\.buffer_load\w*) .*?(\d+(?:x\d+)+)x(?:!tt\.ptr<)?(\w+)"
)
_CONTIGUITY = re.compile(r"contiguity = (\d+)")


@dataclass(slots=True)
class _Block:
    """The lines of a loop, or of what is around all loops, without those of loops inside."""

    loop: bool
    parent: _Block | None = None
    multiplies: bool = False
    tiles: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)

    def read(self, line: str) -> None:
        if self.loop and _DOT.search(line):
            self.multiplies = True
        found = _TILE_LOAD.search(line)
        if found:
            self.tiles.append(f"{found[1]}x{found[2]}")
            if line.find("async_copy_global_to_local") >= 0:
                numbers = _CONTIGUITY.search(line)
                self.copied.append(int(numbers[1] if numbers else 1) * _bytes_of(found[2]))

    def as_loop(self) -> Loop:
        tiles = set(self.tiles)
        return Loop(
            tiles=tuple(sorted(tiles)),
            pipelined=tiles <= set(self.before),
            copied_bytes=min(self.copied, default=None),
        )


def _counts(names: list[str]) -> dict[str, Any]:
    products = {
        kind: sum(pattern.fullmatch(name) is not None for name in names)
        for kind, pattern in MATRIX_PRODUCTS.items()
    }
    return {
        "products": {kind: count for kind, count in products.items() if count},
        "async_copies": sum(ASYNC_COPIES.fullmatch(name) is not None for name in names),
    }


def _bytes_of(dtype: str) -> int:
    """Of an element, from a name such as bf16."""
    return int("".join(filter(str.isdigit, dtype))) // 8


def _by_bytes(names: Iterable[str]) -> dict[int, int]:
    return dict(sorted(Counter(map(_width, names)).items()))


def _width(name: str) -> int:
    """Bytes of a thread that an instruction loads, from its name."""
    if name[0].islower():
        return _AMD_BYTES.get(name.removesuffix("_d16_hi").removesuffix("_d16")[-2:], 4)
    parts = name.split(".")
    if parts[0] == "UTMALDG":
        # A copy of a whole tile, at any rate no narrow one.
        return 16
    for part, size in (("256", 32), ("128", 16), ("64", 8)):
        if part in parts:
            return size
    return {"U16": 2, "S16": 2, "U8": 1, "S8": 1}.get(
        next((part for part in parts if part in ("U16", "S16", "U8", "S8")), ""), 4
    )
