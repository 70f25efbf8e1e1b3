"""Tuned tiles on disk: one file for each GPU, kernel, hidden size, dtype and version of Triton.

A launch takes the tuned tile where there is one and the table of ``tiles.py`` where not. Nothing is
tuned unless asked for, by ``MCPO_TUNE=1`` or ``python -m mcpo_kernels.tune``, and never while a
CUDA graph is captured. Hidden sizes share a tile up to the next power of two; rows and vocabulary
do not matter, so that the bits of a row depend on neither. Another tile adds in another order:
tuning changes the last bits of results.

Files are written whole or not at all. The space of tiles is part of the name, so that a tile that a
later version does not know is not found.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from mcpo_kernels.linear_logprob.triton import tiles
from mcpo_kernels.linear_logprob.triton.tiles import Tile

LEAST_HIDDEN, MOST_HIDDEN = 512, 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What a tile was tuned for."""

    gpu: str
    kernel: str
    family: str
    operands: str
    dtype: str
    hidden: int
    """A power of two."""
    triton: str = triton.__version__

    @property
    def space(self) -> list[Tile]:
        """The tiles it may have."""
        return list(tiles.space(self.kernel, self.family, self.operands))

    @property
    def path(self) -> Path:
        """Where its tile is kept."""
        digest = hashlib.sha256(json.dumps([asdict(self), self.space]).encode()).hexdigest()[:12]
        gpu = re.sub(r"\W+", "-", self.gpu)
        return folder() / f"{gpu}-{self.kernel}-{self.dtype}-{self.hidden}-{digest}.json"


def folder() -> Path:
    """Of all files: ``MCPO_CACHE`` or the user's cache, and in it ``tiles``."""
    given = os.environ.get("MCPO_CACHE")
    if given:
        return Path(given).expanduser() / "tiles"
    # Empty is the same as absent, says the standard of that variable.
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mcpo" / "tiles"


def operands_of(dtype: torch.dtype) -> str:
    """The kind of operands, one of ``tiles.OPERANDS``."""
    return "fp32" if dtype == torch.float32 else "16-bit"


def hidden_class(num_hidden: int) -> int:
    """The hidden size whose tile a size shares."""
    power = 1 << max(num_hidden - 1, 0).bit_length()
    return min(max(power, LEAST_HIDDEN), MOST_HIDDEN)


def keys(device: torch.device, family: str, dtype: torch.dtype, num_hidden: int) -> list[Key]:
    """One for each kernel."""
    name = str(dtype).removeprefix("torch.")
    return [
        Key(
            gpu=torch.cuda.get_device_name(device),
            kernel=kernel,
            family=family,
            operands=operands_of(dtype),
            dtype=name,
            hidden=hidden_class(num_hidden),
        )
        for kernel in tiles.KERNELS
    ]


def load(key: Key) -> Tile | None:
    """The tuned tile, if there is one.

    Raises:
        ValueError: the file does not hold a tile.
    """
    try:
        text = key.path.read_text()
    except FileNotFoundError:
        return None
    try:
        tile = Tile(**json.loads(text)["tile"])
    except (ValueError, KeyError, TypeError):
        tile = None
    if tile not in key.space:
        raise ValueError(
            f"{key.path} must hold a tile as tuning writes it, got {text[:80]!r}; delete the file, "
            "or tune anew with python -m mcpo_kernels.tune"
        )
    return tile


def save(key: Key, tile: Tile, milliseconds: Mapping[Tile, float]) -> None:
    """Keep a tile, with what was measured."""
    measured = [[list(each), taken] for each, taken in milliseconds.items()]
    record = {"key": asdict(key), "tile": tile._asdict(), "milliseconds": measured}
    write_whole(key.path, json.dumps(record))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of two machines that share a folder may have the same number.
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    scratch.write_text(text)
    scratch.replace(path)


def fastest(
    candidates: Iterable[Tile], time: Callable[[Tile], float | None]
) -> tuple[Tile, dict[Tile, float]]:
    """The tile that takes least, and what each took.

    Args:
        candidates: at least one that runs.
        time: milliseconds, or None for a tile that does not run on this device.

    Raises:
        RuntimeError: none runs.
    """
    taken = {tile: found for tile in candidates if (found := time(tile)) is not None}
    if not taken:
        raise RuntimeError("none of the tiles runs on this device; report it with its name")
    return min(taken, key=lambda tile: taken[tile]), taken


def tiles_for(
    device: torch.device, family: str, dtype: torch.dtype, num_hidden: int
) -> Mapping[str, Tile]:
    """The tiles of a launch, by kernel; tunes first if that was asked for."""
    # Interpreted: there is no GPU to know by its name.
    if device.type == "cpu":
        return tiles.default_tiles(family, operands_of(dtype))
    hidden = hidden_class(num_hidden)
    asked = os.environ.get("MCPO_TUNE") == "1"
    if asked and not torch.cuda.is_current_stream_capturing():
        _tune_once(device, family, dtype, hidden)
    return _known(device, family, dtype, hidden)


@functools.cache
def _known(
    device: torch.device, family: str, dtype: torch.dtype, hidden: int
) -> Mapping[str, Tile]:
    found = {key.kernel: load(key) for key in keys(device, family, dtype, hidden)}
    default = tiles.default_tiles(family, operands_of(dtype))
    return {kernel: tile or default[kernel] for kernel, tile in found.items()}


@functools.cache
def _tune_once(device: torch.device, family: str, dtype: torch.dtype, hidden: int) -> None:
    missing = [key for key in keys(device, family, dtype, hidden) if load(key) is None]
    # Of one tile there is nothing to choose.
    missing = [key for key in missing if len(key.space) > 1]
    if missing:
        # Imported here: it runs launches, which ask this file for tiles.
        from mcpo_kernels.tune import tune

        tune(device, dtype, hidden, missing)


def forget() -> None:
    """Read files anew at the next launch, after they have changed."""
    _known.cache_clear()
