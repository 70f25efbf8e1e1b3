"""Compiles one launch for one target, and gathers what the compiler, ptxas and cuobjdump say."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from triton import knobs
from triton.compiler import ASTSource

from mcpo_kernels.targets.launches import gpu_target
from mcpo_kernels.targets.listing import Listing, Loop, read_amdgcn, read_loops, read_sass

if TYPE_CHECKING:
    from mcpo_kernels.targets.devices import Target
    from mcpo_kernels.targets.launches import Launch


@dataclass(frozen=True, kw_only=True, slots=True)
class Binary:
    """What became of a launch."""

    listing: Listing
    loops: tuple[Loop, ...]
    shared: int
    """Bytes of shared memory of a block."""
    warps: int
    """Of a block; more than the launch asked for where the compiler specialises them."""
    tensor_columns: int
    """Of tensor memory of a block."""


def build(launch: Launch, target: Target) -> Binary:
    """Compile a launch anew.

    Raises:
        Exception: whatever Triton raises on a kernel that it cannot compile.
    """
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        _settings(folder),
        contextlib.redirect_stdout(log),
    ):
        compiled: Any = triton.compile(source, target=gpu_target(target), options=launch.options)
        assembly, details = compiled.asm, compiled.metadata
        if target.backend == "hip":
            listing = read_amdgcn(assembly["amdgcn"])
        else:
            listing = read_sass(disassemble(assembly["cubin"], folder), log.getvalue())
    return Binary(
        listing=listing,
        loops=read_loops(assembly["ttgir"]),
        shared=details.shared,
        warps=details.num_warps,
        tensor_columns=getattr(details, "tmem_size", None) or 0,
    )


def disassemble(cubin: bytes, folder: str) -> str:
    """The instructions of a CUDA binary."""
    path = Path(folder) / "kernel.cubin"
    path.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-sass", str(path)]
    # cuobjdump calls the nvdisasm that it finds first.
    tools = os.path.dirname(knobs.nvidia.nvdisasm.path)
    environment = os.environ | {"PATH": os.pathsep.join([tools, os.environ.get("PATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def versions() -> dict[str, str]:
    """Of Triton and of the assemblers that it ships."""
    tools = {"ptxas": knobs.nvidia.ptxas, "ptxas-blackwell": knobs.nvidia.ptxas_blackwell}
    return {"triton": triton.__version__, **{name: tool.version for name, tool in tools.items()}}


@contextlib.contextmanager
def _settings(folder: str) -> Any:
    """Triton compiles whatever it may have kept, into a folder of its own, and ptxas is heard."""
    before = knobs.cache.dir, knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log
    knobs.cache.dir, knobs.compilation.always_compile = folder, True
    knobs.nvidia.dump_ptxas_log = True
    try:
        yield
    finally:
        knobs.cache.dir, knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = before
