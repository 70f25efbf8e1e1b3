"""Keeps what was read of a binary, so that a repeated sweep compiles what has changed alone.

A file is named by the digest of all that decides its content: the source of the kernel and of what
it calls, its specialisation, the target, the versions of the compilers, and the source of what
reads binaries. Verdicts are not kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton

from mcpo_kernels.linear_logprob.triton import tuning
from mcpo_kernels.targets import build as builder
from mcpo_kernels.targets import listing
from mcpo_kernels.targets.build import Binary, build, versions
from mcpo_kernels.targets.listing import Listing, Loop

if TYPE_CHECKING:
    from mcpo_kernels.targets.devices import Target
    from mcpo_kernels.targets.launches import Launch


def build_once(launch: Launch, target: Target, *, fresh: bool) -> Binary:
    """The binary of a launch, from disk if it is there and need not be ``fresh``.

    Raises:
        Exception: whatever Triton raises on a kernel that it cannot compile.
    """
    path = folder() / f"{launch.kernel}-{target.name}-{digest(launch, target)}.json"
    if not fresh and path.exists():
        return _binary(json.loads(path.read_text()))
    binary = build(launch, target)
    tuning.write_whole(path, json.dumps(dataclasses.asdict(binary)))
    return binary


def folder() -> Path:
    """Beside the tuned tiles."""
    return tuning.folder().parent / "targets"


def digest(launch: Launch, target: Target) -> str:
    """Of everything that decides what is read of the binary."""
    parts = [launch.function.cache_key, launch.identity, str(target), *_constant_parts()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


@functools.cache
def _constant_parts() -> list[str]:
    sources = [Path(str(module.__file__)).read_text() for module in (builder, listing)]
    return [triton.__version__, str(versions()), *sources]


def _binary(fields: dict[str, Any]) -> Binary:
    """From JSON, whose keys are text and whose sequences are lists."""
    read, loops = fields.pop("listing"), fields.pop("loops")
    read["loads"] = {int(size): count for size, count in read["loads"].items()}
    return Binary(
        listing=Listing(**read),
        loops=tuple(Loop(**loop | {"tiles": tuple(loop["tiles"])}) for loop in loops),
        **fields,
    )
