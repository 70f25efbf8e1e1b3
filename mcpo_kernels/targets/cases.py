"""What is compiled: every launch of the fused head, over shapes, dtypes, heads and tiles."""
# N scored tokens, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from mcpo_kernels.linear_logprob.head import PANEL, Head, Needs, Saved, Scores
from mcpo_kernels.linear_logprob.triton import tiles
from mcpo_kernels.linear_logprob.triton.backward import backward
from mcpo_kernels.linear_logprob.triton.forward import forward
from mcpo_kernels.linear_logprob.triton.launch import Launch as Setting
from mcpo_kernels.linear_logprob.triton.launch import using
from mcpo_kernels.linear_logprob.triton.tuning import operands_of
from mcpo_kernels.targets.devices import TARGETS, Target
from mcpo_kernels.targets.launches import Launch, record
from mcpo_kernels.testing import Shape

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODELS = {
    "SmolLM2-135M": (576, 49152),
    "GPT-2": (768, 50257),
    "Qwen3-0.6B": (1024, 151936),
    "Llama-3.2-1B": (2048, 128256),
    "Gemma-2-2B": (2304, 256000),
    "Llama-3-8B": (4096, 128256),
    "Qwen2.5-32B": (5120, 152064),
    "Llama-3-70B": (8192, 128256),
}
"""Hidden size and vocabulary."""
ROWS = (4096, 1043, 1)
"""Aligned, ragged and one. No kernel is compiled anew for a count of rows, and this shows it."""
USUAL = Shape(4096, 4096, 128256)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False, "softcap": None, "filter_mass": 0.0},
    "bias, softcap": {"bias": True, "softcap": 30.0, "filter_mass": 0.0},
    "bias, softcap, filter": {"bias": True, "softcap": 30.0, "filter_mass": 0.1},
}
QUICK_HEADS = ("plain", "bias, softcap, filter")
PRECISIONS = ("ieee", "tf32", "tf32x3")
"""Of float32 products; the first is the default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A launch on a target, and what it stands for."""

    target: Target
    launch: Launch
    config: dict[str, Any]
    default: bool
    """Whether this is how the kernel is launched where nothing was tuned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What of everything is wanted; empty is everything."""

    targets: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    quick: bool = False
    """One shape, bf16, the tile that launches take by default."""


def cases(wanted: Selection) -> Iterator[Case]:
    """The launches that differ in what is compiled; of those that do not, the first."""
    seen: set[str] = set()
    for name, target in TARGETS.items():
        if wanted.targets and name not in wanted.targets:
            continue
        for found in _of_target(target, wanted):
            identity = f"{name} {found.launch.identity}"
            kernels = wanted.kernels
            if identity in seen or (kernels and found.launch.kernel not in kernels):
                continue
            seen.add(identity)
            yield found


def _of_target(target: Target, wanted: Selection) -> Iterator[Case]:
    dtypes = wanted.dtypes or (("bf16",) if wanted.quick else tuple(DTYPES))
    for dtype in dtypes:
        for head in QUICK_HEADS if wanted.quick else HEADS:
            yield from launches(target, dtype, head, USUAL)
    if wanted.quick:
        return
    for dtype in dtypes:
        for num_hidden, num_vocab in MODELS.values():
            for num_tokens in ROWS:
                yield from launches(
                    target, dtype, "plain", Shape(num_tokens, num_hidden, num_vocab)
                )
        # A row of panels is one block of a kernel, so the widest counts.
        widest = max(num_vocab for _, num_vocab in MODELS.values())
        yield from launches(target, dtype, QUICK_HEADS[-1], Shape(*USUAL[:2], widest))
        for precision in PRECISIONS[1:] if dtype == "fp32" and target.backend == "cuda" else ():
            yield from launches(target, dtype, "plain", USUAL, precision)
        yield from _tuning_space(target, dtype)


def _tuning_space(target: Target, dtype: str) -> Iterator[Case]:
    """Each kernel in each tile that tuning may try, as the plain head and the fullest have it."""
    # Both kinds of 16 bits have the same tiles, and instructions alike.
    if dtype == "fp16":
        return
    family, operands = _family(target), operands_of(DTYPES[dtype])
    for kernel, head in product(tiles.KERNELS, QUICK_HEADS):
        for tile in tiles.space(kernel, family, operands):
            yield from launches(target, dtype, head, USUAL, tile=(kernel, tile))


def launches(
    target: Target,
    dtype: str,
    head: str,
    shape: Shape,
    precision: str = PRECISIONS[0],
    tile: tuple[str, tiles.Tile] | None = None,
) -> Iterator[Case]:
    """Those of a forward and a backward; with a tile, those of its kernel alone."""
    family, operands = _family(target), operands_of(DTYPES[dtype])
    chosen = dict(tiles.default_tiles(family, operands))
    if tile is not None:
        chosen[tile[0]] = tile[1]
    setting = Setting(family, operands, precision, chosen)

    def run() -> None:
        with using(setting):
            _run(shape, DTYPES[dtype], **HEADS[head])

    for launch in record(target, run):
        if tile is not None and launch.kernel != f"{tile[0]}_kernel":
            continue
        constants = launch.named_constants
        numbers = {name: value for name, value in constants.items() if isinstance(value, int)}
        config = {"dtype": dtype, "head": head, "shape": "x".join(map(str, shape)), **numbers}
        config |= {name: launch.options[name] for name in ("num_warps", "num_stages")}
        if "PRECISION" in constants and dtype == "fp32":
            config["precision"] = precision
        is_default = tile is None and precision == PRECISIONS[0]
        yield Case(target=target, launch=launch, config=config, default=is_default)


def _run(
    shape: Shape, dtype: torch.dtype, *, bias: bool, softcap: float | None, filter_mass: float
) -> None:
    """A forward and a backward for all gradients, without any memory."""

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    num_tokens, num_hidden, num_vocab = shape
    hidden_ND, target_N = empty(num_tokens, num_hidden), empty(num_tokens, dtype=torch.int64)
    bias_V = empty(num_vocab) if bias else None
    head = Head(empty(num_vocab, num_hidden), bias_V, softcap, 1.0)
    lse_panels = -(-num_vocab // PANEL) if filter_mass else 0
    scores: Scores = forward(hidden_ND, target_N, head, lse_panels)
    grad_N = empty(num_tokens, dtype=torch.float32)
    saved = Saved(hidden_ND, target_N, scores)
    backward(grad_N, saved, head, filter_mass, Needs(True, True, bias))


def _family(target: Target) -> str:
    return target.name.replace("_", "")
